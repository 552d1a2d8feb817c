//! The kernel's interfaces, one a file, behind safe functions. This crate's only unsafe code.
#![allow(unsafe_code)]

mod host_region;
mod parts;
mod stop;

pub use host_region::{HostRegion, HostSpan, OutOfRegion};
pub use parts::{FdKind, MAX_PARTS, RecvPart, SendPart, recv_parts, send_parts};
pub use stop::{CancelToken, Stop, StopReason};
