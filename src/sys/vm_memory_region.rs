//! Memory that the `vm-memory` crate of rust-vmm has mapped.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::fstatfs;
use vm_memory::GuestRegionMmap;
use vm_memory::bitmap::Bitmap;

use super::HostRegion;
use super::mapping::{base_page, page_of_file};
use super::untouched::Backing;
use crate::units::PageSize;

impl HostRegion {
    /// The memory of a region of `vm-memory`, which stays mapped as long as this exists, even if the VMM drops the
    /// region.
    ///
    /// # Errors
    /// PermissionDenied if the region is not both readable and writable; the kernel's error for its file.
    pub fn of_vm_memory<B: Bitmap + Send + Sync + 'static>(region: &GuestRegionMmap<B>) -> io::Result<Self> {
        let mapping = region.get_mmap();
        let both = libc::PROT_READ | libc::PROT_WRITE;
        if mapping.prot() & both != both {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let mut page = anonymous_page(mapping.flags());
        let is_shared = mapping.flags() & libc::MAP_SHARED != 0;
        let mut backing = if is_shared { Backing::Unknown } else { Backing::Anonymous };
        if let Some(file) = mapping.file_offset() {
            page = page_of_file(&fstatfs(file.file())?);
            backing = match is_shared {
                true => Backing::File(Arc::new(file.file().try_clone()?.into()), file.start()),
                // Bytes that were never written are those of the file.
                false => Backing::Unknown,
            };
        }
        let (base, len) = (mapping.as_ptr(), mapping.size());
        let base = NonNull::new(base).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the range is mapped, readable and writable, as was checked, until the mapping is dropped, which is
        // the owner here. vm-memory accesses it by volatile accesses and makes no reference to it.
        Ok(unsafe { Self::from_raw(base, len, page, mapping) }.with_backing(backing))
    }
}

/// Page size of memory without a file, from the flags it was mapped with (mmap(2): log2 of the size above
/// MAP_HUGE_SHIFT; without it the default huge page).
fn anonymous_page(flags: i32) -> PageSize {
    if flags & libc::MAP_HUGETLB == 0 {
        return base_page();
    }
    let shift = flags as u32 >> libc::MAP_HUGE_SHIFT & 0x3f;
    PageSize::from_bytes(1 << shift).filter(|page| *page > base_page()).unwrap_or(PageSize::SIZE_2M)
}
