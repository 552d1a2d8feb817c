//! Memory that the kernel may take back because its contents are elsewhere too.

use std::io;

use rustix::mm::{Advice, madvise};

use super::HostSpan;

/// Lets the kernel take the memory of `span` now (MADV_PAGEOUT, Linux 5.4). Its contents stay: pages of a file that were
/// not written since are dropped, and read again from the file if they are touched; others go to the swap space, or
/// stay where there is none. Only whole pages count.
///
/// # Errors
/// The kernel's error: it is older, or the memory is locked.
pub fn page_out(span: HostSpan<'_>) -> io::Result<()> {
    // SAFETY: the advice changes no contents and the range lies inside one live mapping.
    unsafe { madvise(span.as_ptr().cast(), span.len(), Advice::LinuxPageOut)? };
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;

    #[test]
    fn contents_stay_whatever_the_memory_is() {
        for mapping in [Mapping::anonymous(8 * 4096).unwrap(), Mapping::memfd("kept", 8 * 4096).unwrap()] {
            let span = mapping.region().span(0, 8 * 4096).unwrap();
            span.copy_from(&[7; 8 * 4096]);
            page_out(span).unwrap();
            let mut out = vec![0; 8 * 4096];
            span.copy_to(&mut out);
            assert_eq!(out, vec![7; 8 * 4096]);
        }
    }
}
