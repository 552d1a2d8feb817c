//! First writes to protected memory: userfaultfd(2) in its write-protect mode, in which the writer waits.
//!
//! # Source
//! ioctl_userfaultfd(2); linux/userfaultfd.h; the kernel's admin-guide/mm/userfaultfd.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use userfaultfd::{Event, FeatureFlags, IoctlFlags, RegisterMode, Uffd, UffdBuilder};

use super::async_write_protection::to_io;
use super::{FaultAt, HostSpan};

/// linux/userfaultfd.h: `UFFD_FEATURE_WP_HUGETLBFS_SHMEM`.
const WP_SHARED: u64 = 1 << 12;
/// linux/userfaultfd.h: `UFFD_FEATURE_WP_UNPOPULATED`.
const WP_UNPOPULATED: u64 = 1 << 13;

/// Why writes can't be held here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteFaultsError {
    /// The kernel or the privileges of this process do not allow it.
    #[error("userfaultfd: {what} failed ({remedy})")]
    Kernel {
        /// The failed call.
        what: &'static str,
        /// What helps.
        remedy: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// The memory is of a kind whose writes the kernel does not hold.
    #[error(
        "userfaultfd: this kernel can't protect this memory; anonymous memory needs Linux 5.7, a memfd, tmpfs or hugetlbfs \
         Linux 5.19, and a file on a disk can't be protected"
    )]
    Memory,
}

/// A userfaultfd for writes. All addresses are of this process. Dropping it removes all protection, and every waiting
/// thread continues.
#[derive(Debug)]
pub(crate) struct WriteFaults {
    uffd: Uffd,
    /// Missing pages can be protected, too (Linux 6.4).
    protects_unpopulated: bool,
}

impl WriteFaults {
    /// A descriptor that holds the kernel's own writes too (KVM's, read(2)'s): needs `/dev/userfaultfd`, CAP_SYS_PTRACE, or
    /// vm.unprivileged_userfaultfd. With `user_mode_only` it holds those of user mode only, and needs no privilege.
    ///
    /// # Errors
    /// [`WriteFaultsError::Kernel`].
    pub(crate) fn new(user_mode_only: bool) -> Result<Self, WriteFaultsError> {
        let open = |more: u64| {
            let mut builder = UffdBuilder::new();
            builder.close_on_exec(true).non_blocking(true).user_mode_only(user_mode_only);
            builder.require_features(FeatureFlags::PAGEFAULT_FLAG_WP | FeatureFlags::from_bits_retain(more));
            builder.create()
        };
        let (uffd, protects_unpopulated) = match open(WP_SHARED | WP_UNPOPULATED) {
            Ok(uffd) => (Ok(uffd), true),
            // Each older kernel knows less.
            Err(_) => (open(WP_SHARED).or_else(|_| open(0)), false),
        };
        let remedy = "give this process access to /dev/userfaultfd or CAP_SYS_PTRACE, set the sysctl \
                      vm.unprivileged_userfaultfd to 1, and allow the call in its seccomp filter; Linux 5.7 or later";
        let what = "opening a descriptor for writes";
        let uffd = uffd.map_err(|error| WriteFaultsError::Kernel { what, remedy, source: to_io(error) })?;
        Ok(Self { uffd, protects_unpopulated })
    }

    /// Whether [`protect`](Self::protect) protects missing pages of private memory. Otherwise the first write to such a
    /// page is not held.
    pub(crate) fn protects_unpopulated(&self) -> bool {
        self.protects_unpopulated
    }

    /// Writes to `span` can be held from here on; none is held yet. `span` is in whole pages of the memory.
    ///
    /// # Errors
    /// [`WriteFaultsError`].
    pub(crate) fn register(&self, span: HostSpan<'_>) -> Result<(), WriteFaultsError> {
        let start = span.as_ptr().cast();
        let ioctls = match self.uffd.register_with_mode(start, span.len(), RegisterMode::WRITE_PROTECT) {
            Ok(ioctls) => ioctls,
            Err(error) => {
                let source = to_io(error);
                return match source.raw_os_error() {
                    Some(libc::EINVAL) => Err(WriteFaultsError::Memory),
                    _ => Err(WriteFaultsError::Kernel {
                        what: "registering guest memory",
                        remedy: "end the other snapshot, postcopy or dirty tracking by userfaultfd first",
                        source,
                    }),
                };
            }
        };
        if ioctls.contains(IoctlFlags::WRITE_PROTECT) { Ok(()) } else { Err(WriteFaultsError::Memory) }
    }

    /// A first write to a page of `span` waits from here on, until [`lift`](Self::lift).
    ///
    /// # Errors
    /// ENOENT if a part of it is not registered.
    pub(crate) fn protect(&self, span: HostSpan<'_>) -> io::Result<()> {
        retried(|| self.uffd.write_protect(span.as_ptr().cast(), span.len()))
    }

    /// Writes to `span` proceed; threads that wait for one continue.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn lift(&self, span: HostSpan<'_>) -> io::Result<()> {
        retried(|| self.uffd.remove_write_protection(span.as_ptr().cast(), span.len(), true))
    }

    /// The next page whose writer waits, without waiting itself: `None` if there is none.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn next(&self) -> io::Result<Option<FaultAt>> {
        loop {
            match self.uffd.read_event() {
                Ok(Some(Event::Pagefault { addr, .. })) => return Ok(Some(FaultAt(addr as usize))),
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err(userfaultfd::Error::SystemError(errno)) if errno as i32 == libc::EINTR => {}
                Err(error) => return Err(to_io(error)),
            }
        }
    }
}

/// EAGAIN: the address space is being changed, by a fork for instance, and nothing was done.
fn retried(call: impl Fn() -> userfaultfd::Result<()>) -> io::Result<()> {
    loop {
        match call() {
            Ok(()) => return Ok(()),
            Err(userfaultfd::Error::SystemError(errno)) if errno as i32 == libc::EAGAIN => {
                std::thread::yield_now();
            }
            Err(error) => return Err(to_io(error)),
        }
    }
}

impl AsFd for WriteFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;
    use crate::sys::testing::huge_pages;
    use crate::units::PageSize;
    use rustix::event::{PollFd, PollFlags, poll};

    fn next_fault(faults: &WriteFaults) -> FaultAt {
        let mut fds = [PollFd::new(faults, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        faults.next().unwrap().unwrap()
    }

    fn kinds() -> Vec<Mapping> {
        huge_pages(PageSize::SIZE_2M, 8);
        vec![
            Mapping::anonymous(4 * 4096).unwrap(),
            Mapping::memfd("protected", 4 * 4096).unwrap(),
            Mapping::anonymous_huge(8 << 20, PageSize::SIZE_2M).unwrap(),
            Mapping::memfd_huge("protected", 8 << 20, PageSize::SIZE_2M).unwrap(),
        ]
    }

    /// Until the protection is removed a writer waits and the page is unchanged; readers do not wait.
    #[test]
    fn a_writer_waits_until_the_protection_is_lifted() {
        for mapping in kinds() {
            let faults = WriteFaults::new(true).unwrap();
            let region = mapping.region();
            let page = region.page().bytes();
            let span = |number: u64| region.span(number * page, page).unwrap();
            let byte = |number: u64| {
                let mut out = [0];
                span(number).copy_to(&mut out);
                out[0]
            };
            span(1).copy_from(&[1]);
            faults.register(region.span(0, 4 * page).unwrap()).unwrap();
            faults.protect(region.span(0, 4 * page).unwrap()).unwrap();
            let unpopulated = if faults.protects_unpopulated() { 2 } else { 1 };
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| {
                    span(1).copy_from(&[7]);
                    span(unpopulated).copy_from(&[8]);
                });
                let FaultAt(at) = next_fault(&faults);
                assert_eq!((at as u64) & !(page - 1), span(1).address() as u64);
                assert_eq!(byte(1), 1, "as it was");
                faults.lift(span(1)).unwrap();
                if unpopulated == 2 {
                    assert_eq!((next_fault(&faults).0 as u64) & !(page - 1), span(2).address() as u64);
                    assert_eq!(byte(2), 0);
                    faults.lift(span(2)).unwrap();
                }
                writer.join().unwrap();
            });
            assert_eq!(byte(unpopulated), 8);
            assert_eq!(faults.next().unwrap(), None);
        }
    }

    /// Also if the thread that serves the faults is gone.
    #[test]
    fn a_writer_runs_on_when_the_descriptor_is_gone() {
        for mapping in kinds() {
            let faults = WriteFaults::new(true).unwrap();
            let region = mapping.region();
            let page = region.page().bytes();
            let first = region.span(0, page).unwrap();
            first.copy_from(&[1]);
            faults.register(first).unwrap();
            faults.protect(first).unwrap();
            std::thread::scope(|scope| {
                let writer = scope.spawn(move || first.copy_from(&[7]));
                next_fault(&faults);
                drop(faults);
                writer.join().unwrap();
            });
        }
    }

    #[test]
    fn memory_that_cannot_be_protected_is_refused_with_what_can_be() {
        let on_disk = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let mapping = Mapping::file_grown(on_disk.into(), 0, 4096, true).unwrap();
        let faults = WriteFaults::new(true).unwrap();
        let error = faults.register(mapping.region().span(0, 4096).unwrap()).unwrap_err();
        assert!(matches!(error, WriteFaultsError::Memory), "{error}");
    }
}
