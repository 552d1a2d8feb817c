//! Faults of missing memory: userfaultfd(2) in its missing mode, and the calls that place pages.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use userfaultfd::{Event, FeatureFlags, IoctlFlags, RegisterMode, Uffd, UffdBuilder};

use super::async_write_protection::to_io;
use super::handed_faults::{HandedFaultsError, taken};
use super::{HostSpan, Mapping, PageContents};
use crate::units::PageSize;

/// Why missing pages can't be served here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MissingFaultsError {
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
    /// The memory is of a kind whose missing pages the kernel does not report.
    #[error(
        "userfaultfd: the kernel can't serve missing pages of this memory; use anonymous memory, a memfd or hugetlbfs"
    )]
    Memory,
}

/// A userfaultfd for missing pages. All addresses are of this process. When it is dropped, every waiting thread
/// continues, and pages that are still missing read as zero. So it is dropped only when no page is missing, or no such
/// thread runs any more.
#[derive(Debug)]
pub struct MissingFaults {
    uffd: Uffd,
}

/// Address of a fault in this process, as a userfaultfd reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultAt(pub usize);

/// A thread waits for a missing page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingFault {
    /// What it touched.
    pub at: FaultAt,
    /// The thread, by its number in the kernel (gettid(2)); 0 if the descriptor does not report it.
    pub thread: u32,
}

fn foreign(source: MissingFaultsError) -> HandedFaultsError {
    HandedFaultsError::Foreign { source }
}

impl MissingFaults {
    /// A descriptor that reports faults of the kernel's own accesses too (KVM's, read(2)'s): needs `/dev/userfaultfd`,
    /// CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd.
    ///
    /// # Errors
    /// [`MissingFaultsError::Kernel`].
    pub fn new() -> Result<Self, MissingFaultsError> {
        Self::with(false)
    }

    /// A descriptor for faults of user mode only, which needs no privilege. This is enough for a guest whose memory
    /// only threads of this process access in user mode: not for KVM.
    ///
    /// # Errors
    /// [`MissingFaultsError::Kernel`].
    pub fn user_mode_only() -> Result<Self, MissingFaultsError> {
        Self::with(true)
    }

    fn with(user_mode_only: bool) -> Result<Self, MissingFaultsError> {
        let mut builder = UffdBuilder::new();
        builder.close_on_exec(true).non_blocking(true).user_mode_only(user_mode_only);
        let memory = FeatureFlags::MISSING_SHMEM | FeatureFlags::MISSING_HUGETLBFS;
        builder.require_features(memory | FeatureFlags::THREAD_ID);
        let remedy = "give this process access to /dev/userfaultfd or CAP_SYS_PTRACE, set the sysctl \
                      vm.unprivileged_userfaultfd to 1, and allow the call in its seccomp filter";
        let uffd = builder.create().map_err(|error| MissingFaultsError::Kernel {
            what: "opening a descriptor for missing pages",
            remedy,
            source: to_io(error),
        })?;
        Ok(Self { uffd })
    }

    /// Takes a descriptor that the embedder created in this process, with the features that its memory needs enabled
    /// by UFFDIO_API (`UFFD_FEATURE_MISSING_SHMEM`, `UFFD_FEATURE_MISSING_HUGETLBFS`; `UFFD_FEATURE_THREAD_ID` for the
    /// times that vCPUs wait). It is made non-blocking, and no memory may be registered with it yet. So a process that
    /// has given up its rights can still serve faults of the kernel's own accesses.
    ///
    /// # Errors
    /// [`HandedFaultsError`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, HandedFaultsError> {
        let faults = Self { uffd: taken(fd)? };
        // One of another process, or without UFFDIO_API, is found here and not when the guest is handed over.
        let probe = Mapping::anonymous(rustix::param::page_size() as u64);
        if let Ok(span) = probe.as_ref().map(|page| page.region()) {
            let span = span.span(0, span.len()).map_err(|_| foreign(MissingFaultsError::Memory))?;
            faults.register(span).map_err(foreign)?;
            let unregistered = faults.unregister(span);
            unregistered
                .map_err(|source| HandedFaultsError::Kernel { doing: "trying the userfaultfd", source })?;
        }
        Ok(faults)
    }

    /// From here on the first access to a missing page of `span` waits. `span` is in whole pages of the memory.
    ///
    /// # Errors
    /// [`MissingFaultsError`].
    pub fn register(&self, span: HostSpan<'_>) -> Result<(), MissingFaultsError> {
        let start = span.as_ptr().cast();
        let ioctls = self.uffd.register_with_mode(start, span.len(), RegisterMode::MISSING);
        let ioctls = ioctls.map_err(|error| MissingFaultsError::Kernel {
            what: "registering guest memory",
            remedy: "use anonymous memory, a memfd or hugetlbfs, and no other userfaultfd on it",
            source: to_io(error),
        })?;
        if ioctls.contains(IoctlFlags::COPY | IoctlFlags::WAKE) {
            Ok(())
        } else {
            Err(MissingFaultsError::Memory)
        }
    }

    /// Accesses no longer wait; waiting threads continue.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn unregister(&self, span: HostSpan<'_>) -> io::Result<()> {
        self.uffd.unregister(span.as_ptr().cast(), span.len()).map_err(to_io)
    }

    /// Places `bytes` as the contents of `span`, memory in pages of `page` bytes. Each page is placed atomically, and
    /// only if it is missing. Waiting threads continue after [`wake`](Self::wake). `false` if some page was already
    /// present: it is left unchanged, and the others are placed.
    ///
    /// # Errors
    /// The kernel's error: ENOMEM, ENOSPC (a huge page pool is empty), ESRCH.
    pub fn place(&self, span: HostSpan<'_>, bytes: &[u8], page: PageSize) -> io::Result<bool> {
        self.place_contents(span, PageContents::Bytes(bytes), page)
    }

    /// As [`place`](Self::place), also from memory that a device has filled.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub(crate) fn place_contents(
        &self,
        span: HostSpan<'_>,
        contents: PageContents<'_>,
        page: PageSize,
    ) -> io::Result<bool> {
        debug_assert_eq!(span.len(), contents.len());
        let (mut done, mut all) = (0, true);
        while let (Some(from), Some(to)) = (
            contents.part(done, span.len().saturating_sub(done)).filter(|rest| rest.len() > 0),
            span.part(done, span.len().saturating_sub(done)),
        ) {
            let left = to.len();
            // SAFETY: `from` is valid for `left` bytes: both are what is left of as many; the kernel reads them as a
            // user's memory, which may change meanwhile. The target lies in a registered range of guest memory, and the
            // kernel refuses any other. A missing page has no contents that could be lost.
            match unsafe { self.uffd.copy(from.as_ptr().cast(), to.as_ptr().cast(), left, false) } {
                Ok(count) => done += count,
                // EAGAIN: either the page after the copied ones is present, or the address space changed meanwhile and
                // the count is an error number. The copied pages count, and the rest is tried again.
                Err(userfaultfd::Error::PartiallyCopied(count)) => match usize::try_from(count as isize) {
                    Ok(count) if count > 0 => done += count,
                    _ => std::thread::yield_now(),
                },
                Err(userfaultfd::Error::CopyFailed(errno)) if errno as i32 == libc::EEXIST => {
                    (done, all) = (done + page.bytes() as usize, false);
                }
                Err(error) => return Err(to_io(error)),
            }
        }
        Ok(all)
    }

    /// Places zero pages, as [`place`](Self::place).
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zero(&self, span: HostSpan<'_>, page: PageSize) -> io::Result<bool> {
        let bytes = page.bytes() as usize;
        let mut all = true;
        for at in (0..span.len()).step_by(bytes) {
            let part = span.part(at, bytes).ok_or(Errno::INVAL)?;
            // Huge pages have no zero page.
            all &= match bytes > rustix::param::page_size() {
                true => self.place(part, &vec![0; bytes], page)?,
                false => self.place_zero_page(part, page)?,
            };
        }
        Ok(all)
    }

    fn place_zero_page(&self, span: HostSpan<'_>, page: PageSize) -> io::Result<bool> {
        loop {
            // SAFETY: as in `place`.
            match unsafe { self.uffd.zeropage(span.as_ptr().cast(), span.len(), false) } {
                Ok(_) => return Ok(true),
                Err(userfaultfd::Error::ZeropageFailed(errno)) => match errno as i32 {
                    libc::EEXIST => return Ok(false),
                    // Not every kernel has zero pages for shared memory.
                    libc::EINVAL => return self.place(span, &vec![0; span.len()], page),
                    // The address space changed meanwhile.
                    libc::EAGAIN => std::thread::yield_now(),
                    _ => return Err(io::Error::from_raw_os_error(errno as i32)),
                },
                Err(error) => return Err(to_io(error)),
            }
        }
    }

    /// Wakes the threads that wait for a page of `span`; they access it again.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn wake(&self, span: HostSpan<'_>) -> io::Result<()> {
        self.uffd.wake(span.as_ptr().cast(), span.len()).map_err(to_io)
    }

    /// The next page that a thread waits for, without waiting: `None` if there is none. Other events are skipped.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn next(&self) -> io::Result<Option<MissingFault>> {
        loop {
            match self.uffd.read_event() {
                Ok(Some(Event::Pagefault { addr, thread_id, .. })) => {
                    let thread = thread_id.as_raw().unsigned_abs();
                    return Ok(Some(MissingFault { at: FaultAt(addr as usize), thread }));
                }
                Ok(Some(_)) => {}
                Ok(None) => return Ok(None),
                Err(userfaultfd::Error::SystemError(errno)) if errno as i32 == libc::EINTR => {}
                Err(error) => return Err(to_io(error)),
            }
        }
    }
}

impl AsFd for MissingFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use rustix::event::{PollFd, PollFlags, poll};

    fn next_fault(faults: &MissingFaults) -> MissingFault {
        let mut fds = [PollFd::new(faults, PollFlags::IN)];
        poll(&mut fds, None).unwrap();
        faults.next().unwrap().unwrap()
    }

    /// Found when it is handed in, and not when the guest has been handed over.
    #[test]
    fn a_descriptor_that_can_not_watch_memory_here_is_refused() {
        let refused = |fd: OwnedFd| MissingFaults::adopt(fd).unwrap_err().to_string();
        let (pipe, _end) = std::io::pipe().unwrap();
        assert!(refused(pipe.into()).contains("no userfaultfd but pipe:"));
        let flags = rustix::mm::UserfaultfdFlags::from_bits_retain(1);
        // SAFETY: no memory is registered with it.
        let unset = unsafe { rustix::mm::userfaultfd(flags) }.unwrap();
        assert!(refused(unset).contains("UFFDIO_API"));
        let mut builder = UffdBuilder::new();
        let set = builder.user_mode_only(true).create().unwrap();
        MissingFaults::adopt(crate::sys::duplicate(&set).unwrap()).unwrap();
    }

    /// A thread that reads a page waits for it; a page is placed completely and once; zero pages are zero.
    #[test]
    fn a_thread_waits_until_its_page_is_placed() {
        for mapping in [Mapping::anonymous(4 * 4096).unwrap(), Mapping::memfd("missing", 4 * 4096).unwrap()] {
            let faults = MissingFaults::user_mode_only().unwrap();
            let span = |page: u64| mapping.region().span(page * 4096, 4096).unwrap();
            faults.register(mapping.region().span(0, 4 * 4096).unwrap()).unwrap();
            std::thread::scope(|scope| {
                let reads = |page: u64| {
                    let mut out = [1; 4096];
                    span(page).copy_to(&mut out);
                    out
                };
                let (tell, told) = std::sync::mpsc::channel();
                let reader = scope.spawn(move || {
                    tell.send(crate::sys::this_thread()).unwrap();
                    (reads(2), reads(3))
                });
                let MissingFault { at: FaultAt(at), thread } = next_fault(&faults);
                assert_eq!((at & !4095, thread), (span(2).address(), told.recv().unwrap()));
                assert!(faults.place(span(2), &[7; 4096], PageSize::SIZE_4K).unwrap());
                assert!(
                    !faults.place(span(2), &[8; 4096], PageSize::SIZE_4K).unwrap(),
                    "what is there is not replaced"
                );
                faults.wake(span(2)).unwrap();
                assert_eq!(next_fault(&faults).at.0 & !4095, span(3).address());
                assert!(faults.place_zero(span(3), PageSize::SIZE_4K).unwrap());
                faults.wake(span(3)).unwrap();
                assert_eq!(reader.join().unwrap(), ([7; 4096], [0; 4096]));
            });
            assert_eq!(faults.next().unwrap(), None);
            faults.unregister(mapping.region().span(0, 4 * 4096).unwrap()).unwrap();
        }
    }

    /// Pages that are present, at the start, in the middle and at the end, do not keep the others from being placed.
    #[test]
    fn what_is_there_is_left_and_the_pages_around_it_are_placed() {
        const PAGES: u64 = 8;
        for mapping in
            [Mapping::anonymous(PAGES * 4096).unwrap(), Mapping::memfd("missing", PAGES * 4096).unwrap()]
        {
            for zero in [false, true] {
                let faults = MissingFaults::user_mode_only().unwrap();
                let all = mapping.region().span(0, PAGES * 4096).unwrap();
                let page = |page: u64| mapping.region().span(page * 4096, 4096).unwrap();
                crate::sys::discard(all, PageSize::SIZE_4K).unwrap();
                faults.register(all).unwrap();
                for there in [0, 3, 4, 7] {
                    assert!(faults.place(page(there), &[7; 4096], PageSize::SIZE_4K).unwrap());
                }
                let placed = match zero {
                    true => faults.place_zero(all, PageSize::SIZE_4K),
                    false => faults.place(all, &[8; PAGES as usize * 4096], PageSize::SIZE_4K),
                };
                assert!(!placed.unwrap(), "some were there");
                let other = if zero { 0 } else { 8 };
                for (at, byte) in (0..).zip([7, other, other, 7, 7, other, other, 7]) {
                    let mut out = [1; 4096];
                    page(at).copy_to(&mut out);
                    assert_eq!(out, [byte; 4096], "page {at}");
                }
                faults.unregister(all).unwrap();
            }
        }
    }
}
