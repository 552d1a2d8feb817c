//! The package of a switchover to postcopy: the device state between LISTEN and RUN.
//!
//! `LISTEN, device sections, PING(3) [, PING(0x42)], RUN`. The length of the sections is unknown here, so the commands
//! are found from both ends: sections never end in a command.

use super::super::error::{DecodeError, Fault};
use super::command::{Command, HEAD_LEN, decode_command};

/// PING inside the package: all device sections have been read.
pub const PING_LOADED: u32 = 3;
/// PING before RUN from QEMU 10.2 on: its answer means that the destination has taken over the guest.
pub const PING_TAKEN: u32 = 0x42;

/// A package taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package<'a> {
    /// The device sections.
    pub sections: &'a [u8],
    /// Values of the PINGs after them, to be answered in this order once the state is loaded.
    pub pings: Vec<u32>,
}

/// Takes a whole package apart.
///
/// # Errors
/// [`Fault::Body`] if it does not begin with LISTEN or does not end with RUN.
pub fn decode_package(bytes: &[u8]) -> Result<Package<'_>, DecodeError> {
    let malformed =
        |at| DecodeError::corrupt(at, Fault::Body { what: "package of a postcopy switchover", len: 0 });
    let Ok((Command::PostcopyListen, used)) = decode_command(bytes) else { return Err(malformed(0)) };
    let mut rest = bytes.get(used..).unwrap_or(&[]);
    let run = rest.len().checked_sub(HEAD_LEN).ok_or_else(|| malformed(used))?;
    let Ok((Command::PostcopyRun, HEAD_LEN)) = decode_command(&rest[run..]) else {
        return Err(malformed(used + run));
    };
    rest = &rest[..run];
    let mut pings = Vec::new();
    const PING: usize = HEAD_LEN + 4;
    while let Some(at) = rest.len().checked_sub(PING)
        && let Ok((Command::Ping(value @ (PING_LOADED | PING_TAKEN)), PING)) = decode_command(&rest[at..])
    {
        pings.insert(0, value);
        rest = &rest[..at];
    }
    Ok(Package { sections: rest, pings })
}

/// Writes a package: the device sections between LISTEN and RUN. With `taken` a newer QEMU's second PING as well.
pub fn encode_package(sections: &[u8], taken: bool, out: &mut Vec<u8>) {
    Command::PostcopyListen.encode(out);
    out.extend_from_slice(sections);
    Command::Ping(PING_LOADED).encode(out);
    if taken {
        Command::Ping(PING_TAKEN).encode(out);
    }
    Command::PostcopyRun.encode(out);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn p1_p2_a_package_is_taken_apart_in_both_forms() {
        for (taken, pings) in [(false, vec![3]), (true, vec![3, 0x42])] {
            let mut bytes = Vec::new();
            encode_package(b"sections", taken, &mut bytes);
            assert_eq!(decode_package(&bytes).unwrap(), Package { sections: b"sections", pings });
            for cut in 0..bytes.len() {
                assert!(decode_package(&bytes[..cut]).is_err(), "cut at {cut}");
                assert!(cut == 0 || decode_package(&bytes[cut..]).is_err(), "from {cut}");
            }
        }
    }
}
