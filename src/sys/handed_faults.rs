//! A userfaultfd(2) that another process created for its own memory and passed to this one.
//!
//! All addresses are of that process. One thread at a time reads events and places pages, as the kernel requires: until
//! the event of a removed page is read, it places no page (EAGAIN).

use std::fs;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use userfaultfd::{Error, Event, Uffd};

use super::PageContents;

/// linux/userfaultfd.h: `UFFD_FEATURE_EVENT_REMOVE`.
const EVENT_REMOVE: u64 = 1 << 3;

/// The kernel's name for such a descriptor.
const LINK: &str = "anon_inode:[userfaultfd]";

/// A descriptor that can't be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HandedFaultsError {
    /// It is of another kind.
    #[error("the descriptor is no userfaultfd but {what}")]
    Other {
        /// The kernel's description of it.
        what: String,
    },
    /// UFFDIO_API was not called on it, or not with the required features.
    #[error(
        "the userfaultfd does not report removed pages (UFFD_FEATURE_EVENT_REMOVE), so that a balloon's pages \
        would come \
         back as they were; ask for that feature by UFFDIO_API"
    )]
    Features,
    /// It is none for memory of this process, or not set up.
    #[error(
        "the userfaultfd can't watch memory of this process; make it in this process, and enable what its memory \
        needs by UFFDIO_API"
    )]
    Foreign {
        /// Why.
        source: super::MissingFaultsError,
    },
    /// The kernel's error.
    #[error("{doing} failed")]
    Kernel {
        /// The failed call.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
}

/// An event in the other process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HandedEvent {
    /// A thread waits for the page at this address.
    Fault(usize),
    /// These addresses were freed (MADV_DONTNEED, MADV_REMOVE) or unmapped: they no longer have contents.
    Removed(Range<usize>),
    /// Something else.
    Other,
}

/// Result of placing pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// This many bytes were placed, from the first on.
    Placed(usize),
    /// The first page is already present.
    There,
    /// An event must be read first.
    Later,
    /// The first page no longer is memory of the other process.
    Unmapped,
    /// The other process has ended.
    Gone,
}

/// Missing pages of another process.
#[derive(Debug)]
pub struct HandedFaults {
    uffd: Uffd,
}

impl HandedFaults {
    /// Takes a descriptor that came from another process.
    ///
    /// # Errors
    /// [`HandedFaultsError`].
    pub fn adopt(fd: OwnedFd) -> Result<Self, HandedFaultsError> {
        let number = fd.as_raw_fd();
        let uffd = taken(fd)?;
        let told = fs::read_to_string(format!("/proc/self/fdinfo/{number}"))
            .map_err(kernel("looking at the features of the userfaultfd"))?;
        if features(&told).is_none_or(|features| features & EVENT_REMOVE == 0) {
            return Err(HandedFaultsError::Features);
        }
        Ok(Self { uffd })
    }

    /// The next event, without waiting for one.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn next_event(&self) -> io::Result<Option<HandedEvent>> {
        loop {
            return match self.uffd.read_event() {
                Ok(Some(Event::Pagefault { addr, .. })) => Ok(Some(HandedEvent::Fault(addr as usize))),
                Ok(Some(Event::Remove { start, end } | Event::Unmap { start, end })) => {
                    Ok(Some(HandedEvent::Removed(start as usize..end as usize)))
                }
                Ok(Some(_)) => Ok(Some(HandedEvent::Other)),
                Ok(None) => Ok(None),
                Err(Error::SystemError(errno)) if errno as i32 == libc::EINTR => continue,
                Err(Error::SystemError(errno)) => Err(io::Error::from_raw_os_error(errno as i32)),
                Err(error) => Err(io::Error::other(error)),
            };
        }
    }

    /// Places `bytes` at an address of the other process; they are whole pages of its memory there. It wakes no thread.
    ///
    /// # Errors
    /// The kernel's error: ENOMEM, ENOSPC.
    pub fn place(&self, at: usize, bytes: &[u8]) -> io::Result<Placement> {
        self.place_contents(at, PageContents::Bytes(bytes))
    }

    /// As [`place`](Self::place), also from memory that a device has filled.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub(crate) fn place_contents(&self, at: usize, contents: PageContents<'_>) -> io::Result<Placement> {
        // SAFETY: the contents are valid for their length. The target is an address of the process that made the descriptor: the
        // kernel refuses what is not registered there, and fills only pages that are missing, which have no contents.
        match unsafe { self.uffd.copy(contents.as_ptr().cast(), at as *mut _, contents.len(), false) } {
            Ok(count) => Ok(Placement::Placed(count)),
            // The count is an error number if nothing was copied.
            Err(Error::PartiallyCopied(count)) => Ok(match usize::try_from(count as isize) {
                Ok(count) if count > 0 => Placement::Placed(count),
                _ => Placement::Later,
            }),
            Err(Error::CopyFailed(errno)) => placement(errno as i32),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// As [`place`](Self::place), one page of zeros of `len` bytes.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zero(&self, at: usize, len: usize) -> io::Result<Placement> {
        // Huge pages have no zero page.
        if len > rustix::param::page_size() {
            return self.place(at, &vec![0; len]);
        }
        // SAFETY: as in `place`.
        match unsafe { self.uffd.zeropage(at as *mut _, len, false) } {
            Ok(count) => Ok(Placement::Placed(count)),
            Err(Error::ZeropageFailed(errno)) => match errno as i32 {
                libc::EAGAIN => Ok(Placement::Later),
                // Not every kernel has zero pages for shared memory.
                libc::EINVAL => self.place(at, &vec![0; len]),
                errno => placement(errno),
            },
            Err(error) => Err(io::Error::other(error)),
        }
    }

    /// Wakes the threads that wait for pages of these addresses; they access the page again.
    pub fn wake(&self, at: usize, len: usize) {
        if let Err(error) = self.uffd.wake(at as *mut _, len) {
            // Unmapped meanwhile, or the process has ended: no thread waits.
            tracing::debug!(%error, "no thread was woken");
        }
    }
}

fn placement(errno: i32) -> io::Result<Placement> {
    match errno {
        libc::EEXIST => Ok(Placement::There),
        libc::ENOENT => Ok(Placement::Unmapped),
        libc::ESRCH => Ok(Placement::Gone),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn kernel(doing: &'static str) -> impl Fn(io::Error) -> HandedFaultsError {
    move |source| HandedFaultsError::Kernel { doing, source }
}

/// Takes a descriptor that somebody else created, if it is a userfaultfd, and makes it non-blocking.
pub(super) fn taken(fd: OwnedFd) -> Result<Uffd, HandedFaultsError> {
    let what = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .map_err(kernel("looking at the descriptor that was handed over"))?;
    if what.as_os_str() != LINK {
        return Err(HandedFaultsError::Other { what: what.display().to_string() });
    }
    let flags = fcntl_getfl(&fd).map_err(io::Error::from);
    let set = flags.and_then(|flags| Ok(fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?));
    set.map_err(kernel("making the userfaultfd non-blocking"))?;
    // SAFETY: the descriptor is owned and moves in.
    Ok(unsafe { Uffd::from_raw_fd(fd.into_raw_fd()) })
}

/// The enabled features, from `/proc/self/fdinfo`: `API: aa:FEATURES:IOCTLS`, hexadecimal.
fn features(told: &str) -> Option<u64> {
    let api = told.lines().find_map(|line| line.strip_prefix("API:"))?;
    u64::from_str_radix(api.trim().split(':').nth(1)?, 16).ok()
}

impl AsFd for HandedFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;
    use userfaultfd::{FeatureFlags, UffdBuilder};

    fn made(features: FeatureFlags) -> (Uffd, HandedFaults, Mapping) {
        let mut builder = UffdBuilder::new();
        builder.non_blocking(true).user_mode_only(true).require_features(features);
        let (own, mapping) = (builder.create().unwrap(), Mapping::anonymous(4 * 4096).unwrap());
        own.register(mapping.region().address() as *mut _, 4 * 4096).unwrap();
        let fd = crate::sys::duplicate(&own).unwrap();
        (own, HandedFaults::adopt(fd).unwrap(), mapping)
    }

    #[test]
    fn what_is_no_userfaultfd_or_tells_too_little_is_refused_by_name() {
        let refused = |fd: OwnedFd| HandedFaults::adopt(fd).unwrap_err().to_string();
        let (pipe, _end) = std::io::pipe().unwrap();
        assert!(refused(pipe.into()).contains("no userfaultfd but pipe:"));
        assert!(refused(fs::File::open("/dev/null").unwrap().into()).contains("but /dev/null"));
        let mut builder = UffdBuilder::new();
        let plain = builder.non_blocking(true).user_mode_only(true).create().unwrap();
        assert!(refused(crate::sys::duplicate(&plain).unwrap()).contains("UFFD_FEATURE_EVENT_REMOVE"));
        let unset = "pending:\t0\ntotal:\t0\nAPI:\taa:0:fc\n";
        assert_eq!(
            (features(unset), features("x"), features("API:\taa:80000008:1")),
            (Some(0), None, Some(0x8000_0008))
        );
    }

    #[test]
    fn pages_are_placed_once_and_removed_pages_are_told_before_any_is_placed() {
        let (_own, faults, mapping) = made(FeatureFlags::EVENT_REMOVE);
        let at = |page: usize| mapping.region().address() + page * 4096;
        assert_eq!(faults.place(at(1), &[7; 8192]).unwrap(), Placement::Placed(8192));
        assert_eq!(faults.place(at(2), &[8; 4096]).unwrap(), Placement::There);
        assert_eq!(faults.place_zero(at(0), 4096).unwrap(), Placement::Placed(4096));
        std::thread::scope(|scope| {
            let span = mapping.region().span(4096, 4096).unwrap();
            scope.spawn(move || crate::sys::discard(span, crate::units::PageSize::SIZE_4K).unwrap());
            // No page can be placed until the event is read. The removal may not have begun.
            let event = loop {
                match faults.place(at(3), &[9; 4096]).unwrap() {
                    Placement::Later => break faults.next_event().unwrap(),
                    _ => match faults.next_event().unwrap() {
                        None => std::thread::yield_now(),
                        event => break event,
                    },
                }
            };
            assert_eq!(event, Some(HandedEvent::Removed(at(1)..at(2))));
        });
        // After the event the page is missing again.
        let again = loop {
            match faults.place_zero(at(1), 4096).unwrap() {
                Placement::Later => std::thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(again, Placement::Placed(4096));
        let mut bytes = [1; 3 * 4096];
        mapping.region().span(0, 3 * 4096).unwrap().copy_to(&mut bytes);
        assert!(bytes[..8192] == [0; 8192] && bytes[8192..] == [7; 4096]);
    }
}
