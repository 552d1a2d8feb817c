//! The kernel's interfaces, one a file, behind safe functions. This crate's only unsafe code.
#![allow(unsafe_code)]

mod host_region;
mod mapping;
mod parts;
mod scan;
mod stop;
#[cfg(test)]
pub(crate) mod testing;

pub use host_region::{HostRegion, HostSpan, OutOfRegion};
pub use mapping::{Mapping, MappingError, discard, populate};
pub use parts::{FdKind, MAX_PARTS, RecvPart, SendPart, recv_parts, send_parts};
pub use scan::is_zero;
pub use stop::{CancelToken, Stop, StopReason};
