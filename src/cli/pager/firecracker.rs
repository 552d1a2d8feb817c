//! Firecracker's message to the process that serves its memory: a JSON array of the regions, with the userfaultfd.
//!
//! Each element has `base_host_virt_addr`, `size`, `offset` (in the memory file) and `page_size`, all in bytes. The
//! field `page_size_kib`, in spite of its name in bytes, is ignored. There is no length before it, no answer, and no
//! later message: the connection stays open as long as the VMM runs.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use ramwire::session::HandedRegion;
use ramwire::sys::Stop;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recvmsg};
use serde::Deserialize;

use super::handoff::{HandOff, HandOffError, Handed};

/// Maximum length of the message in bytes; Firecracker's has some 150 for each region.
const MAX_MESSAGE: usize = 1 << 20;

/// Maximum number of received descriptors: more than one, so that extra ones are noticed.
const MAX_DESCRIPTORS: usize = 8;

/// Firecracker's way.
pub(super) struct Firecracker;

/// A region in the message. Other fields are ignored.
#[derive(Debug, Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
}

impl HandOff for Firecracker {
    fn receive(&self, connection: &UnixStream, stop: &Stop) -> Result<Handed, HandOffError> {
        let (mut text, mut descriptors) = (Vec::new(), Vec::new());
        loop {
            match stop.wait(connection.as_fd(), PollFlags::IN) {
                Ok(None) => {}
                Ok(Some(reason)) => return Err(HandOffError::Unfinished(format!("{reason}"))),
                Err(error) => return Err(error.into()),
            }
            if receive_part(connection, &mut text, &mut descriptors)? == 0 {
                let why = format!("it hung up after {} bytes", text.len());
                return Err(HandOffError::Unfinished(why));
            }
            if let Some(regions) = regions(&text)? {
                return Ok(Handed { regions, faults: only(descriptors)? });
            }
        }
    }
}

/// Appends received bytes. Returns how many; 0 at the end.
fn receive_part(
    connection: &UnixStream,
    text: &mut Vec<u8>,
    descriptors: &mut Vec<OwnedFd>,
) -> Result<usize, HandOffError> {
    let mut bytes = [0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = match recvmsg(connection, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
        Ok(message) => message,
        // Looked at again.
        Err(Errno::INTR | Errno::AGAIN) => return Ok(1),
        Err(errno) => return Err(io::Error::from(errno).into()),
    };
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = message {
            descriptors.extend(more);
        }
    }
    if message.flags.contains(ReturnFlags::CTRUNC) || descriptors.len() > MAX_DESCRIPTORS {
        return Err(HandOffError::Descriptors(descriptors.len() + 1));
    }
    text.extend_from_slice(&bytes[..message.bytes]);
    if text.len() > MAX_MESSAGE {
        return Err(HandOffError::Long(MAX_MESSAGE));
    }
    Ok(message.bytes)
}

fn only(mut descriptors: Vec<OwnedFd>) -> Result<OwnedFd, HandOffError> {
    match (descriptors.pop(), descriptors.len()) {
        (Some(one), 0) => Ok(one),
        (None, _) => Err(HandOffError::Descriptors(0)),
        (Some(_), more) => Err(HandOffError::Descriptors(more + 1)),
    }
}

/// The regions; `None` if more bytes must follow.
fn regions(text: &[u8]) -> Result<Option<Vec<HandedRegion>>, HandOffError> {
    let regions: Vec<Region> = match serde_json::from_slice(text) {
        Ok(regions) => regions,
        Err(error) if error.is_eof() => return Ok(None),
        Err(error) => return Err(HandOffError::Message(error.to_string())),
    };
    let region = |Region { base_host_virt_addr: address, size: len, offset, page_size: page }| HandedRegion {
        address,
        len,
        page,
        offset,
    };
    Ok(Some(regions.into_iter().map(region).collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ONE: &str = r#"[{"base_host_virt_addr":140000000000000,"size":4096,"offset":0,"page_size":4096,"page_size_kib":4096}]"#;

    #[test]
    fn the_message_is_whole_when_its_array_is_and_bad_ones_are_refused_by_what_is_wrong() {
        let one = HandedRegion { address: 140_000_000_000_000, len: 4096, page: 4096, offset: 0 };
        assert_eq!(regions(ONE.as_bytes()).unwrap(), Some(vec![one]));
        for cut in 0..ONE.len() {
            assert_eq!(regions(&ONE.as_bytes()[..cut]).unwrap(), None, "{cut} bytes");
        }
        for (bad, part) in [
            (ONE.replace("\"page_size\"", "\"pages\""), "missing field `page_size`"),
            (ONE.replace("\"size\"", "\"length\""), "missing field `size`"),
            (ONE.replace(":0,", ":-1,"), "invalid value: integer `-1`"),
            (ONE.replace(":0,", ":1.5,"), "floating point"),
            (ONE.replace(":0,", ":99999999999999999999,"), "invalid type"),
            (ONE.replace(":0,", ":\"0\","), "invalid type: string"),
            (format!("{ONE}x"), "trailing characters"),
            ("{}".into(), "invalid type: map"),
            ("\u{1}".into(), "expected value"),
            ("[".repeat(200), "invalid type: sequence"),
        ] {
            let error = regions(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{bad}: {error}");
        }
    }
}
