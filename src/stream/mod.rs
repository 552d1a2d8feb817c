//! The migration stream: bytes in, values out.
//!
//! No file of this module reads a socket, starts a thread or reads a clock. Every decoder is a function from bytes to a
//! value and the number of bytes it took, or to a [`DecodeError`], which keeps *more bytes are needed* apart from
//! *these bytes are wrong*. No allocation follows a peer's number before the bytes that it announces have arrived or
//! the number is checked against a named limit.

pub mod channel_count;
pub mod checkpoints;
mod error;
pub mod native;
pub mod page_counts;
pub mod page_requests;
pub mod qemu;
mod reader;
pub mod snapshot_chain;
pub mod snapshot_note;
mod writer;
pub mod xbzrle;

pub use error::{Corrupt, DecodeError, Fault};
pub use reader::Reader;
pub use writer::Writer;
