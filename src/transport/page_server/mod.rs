//! Memory at rest that others read over a connection: [`PageServer`] at its host, [`RemoteMemory`] at the other.

mod client;
mod server;
#[cfg(test)]
mod tests;

pub use client::RemoteMemory;
pub use server::{PageServer, ServedPages};

use crate::sys::{RecvPart, Stop};
use crate::transport::{ByteSource as _, ChannelError, StreamChannel};

/// Fills all of `into`; `false` if the peer has closed before its first byte.
pub(super) fn fill(
    channel: &mut StreamChannel,
    into: &mut [u8],
    doing: &'static str,
    stop: &Stop,
) -> Result<bool, ChannelError> {
    let mut done = 0;
    while done < into.len() {
        match channel.recv(&mut [RecvPart::Own(&mut into[done..])], stop)? {
            0 if done == 0 => return Ok(false),
            0 => return Err(ChannelError::Closed { peer: channel.peer().to_owned(), doing }),
            got => done += got,
        }
    }
    Ok(true)
}

/// Messages of the peer that make no sense.
fn not_understood(
    channel: &StreamChannel,
    doing: &'static str,
    why: impl std::error::Error + Send + Sync + 'static,
) -> ChannelError {
    ChannelError::Io { peer: channel.peer().to_owned(), doing, source: std::io::Error::other(why) }
}
