//! Memory a NIC may use. The only module of this crate with `unsafe` code.

#![allow(unsafe_code)]

mod pinned;

pub use pinned::PinnedSpan;
