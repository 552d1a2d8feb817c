//! The promise that makes an address fit for a NIC.

use std::ptr::NonNull;

/// Address range of memory that stays mapped, writable and in place.
///
/// Only [`PinnedSpan::new`] makes one, and that is `unsafe`: the fabric hands the range to a device that reads and
/// writes it past every borrow check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PinnedSpan {
    address: usize,
    len: u64,
}

impl PinnedSpan {
    /// # Safety
    ///
    /// As long as the [`RegionMemory`](crate::RegionMemory) that returns this span is alive:
    /// - `start..start + len` is one mapping (or several, adjacent) with read and write access;
    /// - it is not unmapped, remapped or discarded (`munmap`, `mremap`, `MADV_DONTNEED`, hole punching);
    /// - there is no Rust reference into it: the device writes to it at any time.
    pub unsafe fn new(start: NonNull<u8>, len: u64) -> Self {
        Self { address: start.as_ptr() as usize, len }
    }

    /// First byte's address in this process.
    pub fn address(self) -> usize {
        self.address
    }

    /// Bytes.
    pub fn len(self) -> u64 {
        self.len
    }

    /// True if there is no byte.
    pub fn is_empty(self) -> bool {
        self.len == 0
    }
}
