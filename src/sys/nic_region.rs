//! Mapped guest RAM as a NIC needs it: at a fixed address.

use std::sync::Arc;

use rdma_hooks::{PinnedSpan, RegionMemory};

use super::{HostRegion, HostSpan, is_zero};

/// Step in which memory is zeroed and checked, so that a page that is already zero is not touched.
const STEP: u64 = 4096;

/// The first bytes of a region. Clones of the region keep the mapping.
struct NicMemory {
    region: HostRegion,
    len: u64,
}

impl HostRegion {
    /// The first `len` bytes for a NIC; `None` if the region has fewer.
    ///
    /// The memory must not be discarded while the result or a part of it exists: the NIC would continue to use the old
    /// pages (`GuestControl::forbid_discard`).
    pub(crate) fn for_nic(&self, len: u64) -> Option<rdma_hooks::HostRegion> {
        self.span(0, len).ok()?;
        Some(rdma_hooks::HostRegion::new(Arc::new(NicMemory { region: self.clone(), len })))
    }
}

impl NicMemory {
    /// `None` for a range outside, which the caller never requests.
    fn span(&self, offset: u64, len: u64) -> Option<HostSpan<'_>> {
        self.region.span(offset, len).ok()
    }

    fn steps(&self, offset: u64, len: u64) -> impl Iterator<Item = HostSpan<'_>> {
        let end = offset.saturating_add(len).min(self.len);
        let starts = (offset..end).step_by(STEP as usize);
        starts.filter_map(move |at| self.span(at, STEP.min(end - at)))
    }
}

impl RegionMemory for NicMemory {
    fn len(&self) -> u64 {
        self.len
    }

    fn read(&self, offset: u64, into: &mut [u8]) {
        if let Some(span) = self.span(offset, into.len() as u64) {
            span.copy_to(into);
        }
    }

    fn write(&self, offset: u64, from: &[u8]) {
        if let Some(span) = self.span(offset, from.len() as u64) {
            span.copy_from(from);
        }
    }

    fn zero(&self, offset: u64, len: u64) {
        self.steps(offset, len).filter(|span| !is_zero(*span)).for_each(HostSpan::fill_zero);
    }

    fn is_zero(&self, offset: u64, len: u64) -> bool {
        self.span(offset, len).is_some_and(is_zero)
    }

    fn pinned(&self) -> Option<PinnedSpan> {
        let start = std::ptr::NonNull::new(self.span(0, self.len)?.as_ptr())?;
        // SAFETY: the region holds at least `len` bytes, mapped readable and writable until its last clone is dropped,
        // and this value holds a clone; no Rust reference into it exists (both by `HostRegion::from_raw`). The crate
        // never remaps a region, and no page is discarded while a NIC has it registered (`for_nic`).
        Some(unsafe { PinnedSpan::new(start, self.len) })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use crate::sys::Mapping;

    #[test]
    fn a_nic_sees_the_bytes_of_the_region_and_not_one_more() {
        let mapping = Mapping::anonymous(3 * 4096).unwrap();
        let region = mapping.region();
        assert!(region.for_nic(3 * 4096 + 1).is_none());
        let nic = region.for_nic(2 * 4096 + 100).unwrap();
        assert_eq!(nic.pinned(), Some((region.address(), 2 * 4096 + 100)));
        nic.write(4095, b"abc").unwrap();
        let mut seen = [0; 3];
        region.span(4095, 3).unwrap().copy_to(&mut seen);
        assert_eq!(&seen, b"abc");
        region.span(2 * 4096 + 100, 1).unwrap().copy_from(b"x");
        assert!(!nic.is_zero(0, nic.len()).unwrap());
        nic.zero(0, nic.len()).unwrap();
        assert!(nic.is_zero(0, nic.len()).unwrap());
        region.span(2 * 4096 + 100, 1).unwrap().copy_to(&mut seen[..1]);
        assert_eq!(seen[0], b'x', "past the end nothing is touched");
    }
}
