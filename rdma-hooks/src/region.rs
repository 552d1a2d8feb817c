//! Guest memory as this crate sees it: an object with a length and a fixed place.
//!
//! Guest RAM is never a `&[u8]`: the guest and the NIC write to it at any time. The embedder implements
//! [`RegionMemory`] over its mapping; a [`HostRegion`] is a shared handle on a part of it. A memory registration keeps
//! its `HostRegion`, and with it the mapping, alive until the device no longer uses it, so memory cannot be unmapped
//! before it is deregistered.

use std::fmt;
use std::sync::Arc;

use crate::verbs::PinnedSpan;

/// Memory of the embedder that a fabric may read and write.
///
/// All ranges passed in lie inside `0..len()`; the implementation may rely on that only for its own assertions, and
/// must stay memory safe without it. Methods take `&self`: other threads, the guest and the NIC use the memory at the
/// same time, so use relaxed atomic or volatile copies.
///
/// Memory handed to this crate must not be discarded, punched or remapped before every [`HostRegion`] on it is gone:
/// a registered page that is replaced leaves the NIC writing to the old one.
pub trait RegionMemory: Send + Sync {
    /// Bytes.
    fn len(&self) -> u64;
    /// True if there is no byte.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Copies out `into.len()` bytes from `offset`. Only the simulated fabric reads this way.
    fn read(&self, offset: u64, into: &mut [u8]);
    /// Stores `from` at `offset`. Only the simulated fabric writes this way.
    fn write(&self, offset: u64, from: &[u8]);
    /// Makes a range read as zero by storing to it, never by discarding. Pages that are already zero should be left
    /// untouched: storing to them would populate them.
    fn zero(&self, offset: u64, len: u64);
    /// True if the whole range reads as zero at the moment of the check.
    fn is_zero(&self, offset: u64, len: u64) -> bool;
    /// The memory's address, for a NIC; `None` restricts it to the simulated fabric.
    fn pinned(&self) -> Option<PinnedSpan> {
        None
    }
}

/// A range outside of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("range {offset:#x}+{len:#x} is outside of a region of {region:#x} bytes")]
pub struct OutOfRegion {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes in the region.
    pub region: u64,
}

/// A part of some [`RegionMemory`], kept alive by this handle.
#[derive(Clone)]
pub struct HostRegion {
    memory: Arc<dyn RegionMemory>,
    start: u64,
    len: u64,
}

impl fmt::Debug for HostRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostRegion({:#x}+{:#x})", self.start, self.len)
    }
}

impl HostRegion {
    /// All of `memory`.
    pub fn new(memory: Arc<dyn RegionMemory>) -> Self {
        let len = memory.len();
        Self { memory, start: 0, len }
    }

    /// Bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True if there is no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A part of this region.
    ///
    /// # Errors
    ///
    /// [`OutOfRegion`] unless `offset + len` lies inside.
    pub fn part(&self, offset: u64, len: u64) -> Result<Self, OutOfRegion> {
        self.check(offset, len)?;
        Ok(Self { memory: Arc::clone(&self.memory), start: self.start + offset, len })
    }

    /// Copies bytes out.
    ///
    /// # Errors
    ///
    /// [`OutOfRegion`]; nothing was read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), OutOfRegion> {
        self.check(offset, into.len() as u64)?;
        self.memory.read(self.start + offset, into);
        Ok(())
    }

    /// Copies bytes in.
    ///
    /// # Errors
    ///
    /// [`OutOfRegion`]; nothing was written.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<(), OutOfRegion> {
        self.check(offset, from.len() as u64)?;
        self.memory.write(self.start + offset, from);
        Ok(())
    }

    /// Makes a range read as zero.
    ///
    /// # Errors
    ///
    /// [`OutOfRegion`]; nothing was written.
    pub fn zero(&self, offset: u64, len: u64) -> Result<(), OutOfRegion> {
        self.check(offset, len)?;
        self.memory.zero(self.start + offset, len);
        Ok(())
    }

    /// True if the whole range reads as zero.
    ///
    /// # Errors
    ///
    /// [`OutOfRegion`].
    pub fn is_zero(&self, offset: u64, len: u64) -> Result<bool, OutOfRegion> {
        self.check(offset, len)?;
        Ok(self.memory.is_zero(self.start + offset, len))
    }

    /// Address and length of this part, for a NIC; `None` if the memory has no fixed address.
    pub fn pinned(&self) -> Option<(usize, u64)> {
        let whole = self.memory.pinned()?;
        let end = self.start.checked_add(self.len)?;
        (end <= whole.len()).then(|| (whole.address() + self.start as usize, self.len))
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), OutOfRegion> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(OutOfRegion { offset, len, region: self.len }),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::sim::SparseMemory;

    #[test]
    fn parts_stay_inside_and_share_bytes() {
        let region = HostRegion::new(Arc::new(SparseMemory::new(0x3000)));
        let part = region.part(0x1000, 0x2000).unwrap();
        part.write(0x10, b"abc").unwrap();
        let mut seen = [0; 3];
        region.read(0x1010, &mut seen).unwrap();
        assert_eq!(&seen, b"abc");
        assert!(!region.is_zero(0, 0x3000).unwrap());
        part.zero(0, 0x1000).unwrap();
        assert!(region.is_zero(0, 0x3000).unwrap());
        for (offset, len) in [(0, 0x2001), (0x2000, 1), (u64::MAX, 1), (1, u64::MAX)] {
            let refused = OutOfRegion { offset, len, region: 0x2000 };
            assert_eq!(part.zero(offset, len), Err(refused));
            assert_eq!(part.part(offset, len).map(|_| ()), Err(refused));
        }
        assert_eq!(part.pinned(), None);
    }
}
