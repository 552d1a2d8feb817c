//! Functions for the bare loops in addition to the standard library: the memory as plain bytes, and a socket's
//! low-water mark.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use ramwire::sys::Mapping;

/// The memory of a bare loop's sender. No other thread writes it meanwhile: no guest runs in a bench.
pub fn bytes(mapping: &Mapping) -> &[u8] {
    let region = mapping.region();
    // SAFETY: the region is mapped readable for its whole length as long as the borrow of `mapping`, and nothing in this
    // program or another writes it while a run sends from it.
    unsafe { std::slice::from_raw_parts(region.address() as *const u8, region.len() as usize) }
}

/// The memory of a bare loop's receiver, the only one that reads and writes it.
pub fn bytes_mut(mapping: &mut Mapping) -> &mut [u8] {
    let region = mapping.region();
    // SAFETY: the region is mapped writable for its whole length as long as the borrow of `mapping`, which is exclusive; no
    // other process touches the file before this one has ended.
    unsafe { std::slice::from_raw_parts_mut(region.address() as *mut u8, region.len() as usize) }
}

/// Sets how many bytes must be in a socket before a read returns or `poll(2)` reports it as readable (SO_RCVLOWAT,
/// socket(7)).
///
/// # Errors
/// The error of `setsockopt(2)`.
pub fn set_low_water(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` bytes of a value that outlives the call.
    let set = unsafe {
        let value = std::ptr::from_ref(&bytes).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, value, len)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
