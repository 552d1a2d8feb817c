//! Descriptors that are given as numbers: those of other crates' types, and those that this process was started with.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// A descriptor of our own for the same open file, closed on exec; for types that expose only the number, such as
/// `VmFd` of kvm-ioctls.
///
/// # Errors
/// `EBADF` if it is not open; `EMFILE`.
pub fn duplicate(of: &impl AsRawFd) -> io::Result<OwnedFd> {
    // SAFETY: a number that is not open fails with EBADF; the new number has no other owner.
    let new = unsafe { libc::fcntl(of.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made by the kernel, without an owner.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

/// Makes the inherited descriptor `number` this program's own, closed on exec.
///
/// Standard input, output and error are duplicated, since the standard library keeps using them; ownership of any other
/// is taken, so that the peer sees it closed when we close it.
///
/// # Errors
/// `EBADF` if there is no such descriptor; `InvalidInput` if it was opened by this process itself (or taken before),
/// which its close-on-exec flag shows: it then has another owner.
pub fn take_inherited_fd(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD only reads a flag; a number that is not open fails with EBADF.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    if number <= 2 {
        return duplicate(&number);
    }
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "was not handed to this process when it was started",
        ));
    }
    // SAFETY: sets a flag of an open descriptor.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: open, and inherited through exec: everything that this program opens carries the flag that was clear
    // here, so no other code owns the number; setting the flag makes sure that it is not taken twice.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn only_what_was_handed_in_is_taken_and_only_once() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let refused = take_inherited_fd(reader.as_raw_fd()).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput);
        let number = reader.into_raw_fd();
        // SAFETY: clears a flag of a descriptor that has no owner now.
        assert_eq!(unsafe { libc::fcntl(number, libc::F_SETFD, 0) }, 0);
        let taken = take_inherited_fd(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(take_inherited_fd(number).is_err());
        assert!(take_inherited_fd(2).unwrap().as_raw_fd() > 2);
        assert_eq!(take_inherited_fd(i32::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
