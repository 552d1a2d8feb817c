//! Write protection that the kernel removes by itself: userfaultfd in its asynchronous mode.
//!
//! A first write to a protected page clears the protection of that page and continues; no thread waits or is woken.
//! [`Pagemap`](super::Pagemap) finds the pages that lost their protection. Needs Linux 6.7. The descriptor is opened
//! for faults of user mode only, which needs no privilege; the asynchronous mode nevertheless records writes by the
//! kernel too (read(2) into guest RAM, KVM's vCPUs), because it passes no fault to user space.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::ioctl::{Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};
use userfaultfd::{RegisterMode, Uffd};

/// linux/userfaultfd.h: `UFFD_API`.
const UFFD_API: u64 = 0xAA;
/// linux/userfaultfd.h.
const UFFD_USER_MODE_ONLY: u32 = 1;
/// linux/userfaultfd.h: write protection of anonymous memory, of shared memory and huge pages, of missing pages, and
/// without a fault to user space.
const FEATURES: u64 = 1 | 1 << 12 | 1 << 13 | 1 << 15;

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// Why such a descriptor is not available here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(crate) enum UffdError {
    /// The system call is missing or forbidden.
    #[error(
        "userfaultfd is not available; allow the system call in the seccomp filter (CONFIG_USERFAULTFD=y)"
    )]
    Open {
        /// The kernel's error.
        source: io::Error,
    },
    /// The kernel has no asynchronous write protection.
    #[error("userfaultfd has no asynchronous write protection; Linux 6.7 or later has it")]
    Features {
        /// The kernel's error.
        source: io::Error,
    },
}

/// A userfaultfd in asynchronous write-protect mode. All ranges are addresses of the process that made it, in whole
/// pages of the memory there. Dropping the last descriptor removes all protection.
#[derive(Debug)]
pub(crate) struct WriteProtector {
    uffd: Uffd,
}

impl WriteProtector {
    /// A descriptor for this process.
    ///
    /// # Errors
    /// [`UffdError`].
    pub(crate) fn new() -> Result<Self, UffdError> {
        let user_mode_only = UserfaultfdFlags::from_bits_retain(UFFD_USER_MODE_ONLY);
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | user_mode_only;
        // SAFETY: the descriptor is used for asynchronous write protection only, which moves no contents.
        let fd = unsafe { userfaultfd(flags) };
        // Before 5.11 the flag is unknown; such a kernel lacks the features too, which the next call reports.
        let fd = fd.map_err(|errno| UffdError::Open { source: errno.into() })?;
        let mut api = UffdioApi { api: UFFD_API, features: FEATURES, ioctls: 0 };
        const API: rustix::ioctl::Opcode = opcode::read_write::<UffdioApi>(UFFD_API as u8, 0x3F);
        // SAFETY: UFFDIO_API reads and writes one struct uffdio_api, whose layout UffdioApi has.
        unsafe { ioctl(&fd, Updater::<API, UffdioApi>::new(&mut api)) }
            .map_err(|errno| UffdError::Features { source: errno.into() })?;
        Ok(Self::adopt(fd))
    }

    /// Takes a descriptor that another process created and set up with the same features; ranges are then addresses of
    /// that process.
    pub(crate) fn adopt(fd: OwnedFd) -> Self {
        // SAFETY: the descriptor is owned and moves in.
        Self { uffd: unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) } }
    }

    /// Puts `range` under this descriptor.
    ///
    /// # Errors
    /// EBUSY if another userfaultfd is registered on it, EINVAL if it is not mapped or not in whole pages.
    pub(crate) fn register(&self, range: Range<usize>) -> io::Result<()> {
        let mode = RegisterMode::WRITE_PROTECT;
        self.uffd.register_with_mode(range.start as *mut _, range.len(), mode).map_err(to_io)?;
        Ok(())
    }

    /// Protects every page of `range`, including missing ones.
    ///
    /// # Errors
    /// ENOENT if a part of the range is not registered.
    pub(crate) fn protect(&self, range: Range<usize>) -> io::Result<()> {
        self.uffd.write_protect(range.start as *mut _, range.len()).map_err(to_io)
    }

    /// Removes the protection of `range` and unregisters it.
    ///
    /// # Errors
    /// EINVAL if the range is no longer mapped.
    pub(crate) fn unregister(&self, range: Range<usize>) -> io::Result<()> {
        self.uffd.unregister(range.start as *mut _, range.len()).map_err(to_io)
    }
}

impl AsFd for WriteProtector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

/// The kernel's answer, whichever call it was to.
pub(super) fn to_io(error: userfaultfd::Error) -> io::Error {
    use userfaultfd::Error::{CopyFailed, OpenDevUserfaultfd, SystemError, ZeropageFailed};
    match error {
        SystemError(errno) | CopyFailed(errno) | ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        OpenDevUserfaultfd(error) => error,
        other => io::Error::other(other),
    }
}
