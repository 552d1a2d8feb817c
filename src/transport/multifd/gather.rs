//! Which of the connections that come is the main channel.
//!
//! A QEMU 7.2 connects main first and the channels after it; later ones connect in any order and are told apart by
//! their first four bytes, which older ones write as well.

use std::time::Duration;

use crate::stream::qemu::{file, multifd};
use crate::sys::{Stop, StopReason};
use crate::transport::open::OpenError;
use crate::transport::{ChannelError, StreamChannel, StreamOptions};

/// The main channel and `count` page channels, each taken by `accept`. The first may take its time; the others
/// must come within `options.dead_peer`, and so must the first bytes of all.
///
/// # Errors
/// [`OpenError::Channels`] if fewer come, or none or several of them are the main channel.
pub(in crate::transport) fn accept(
    count: u8,
    address: &str,
    options: &StreamOptions,
    stop: &Stop,
    mut accept: impl FnMut(&Stop) -> Result<StreamChannel, OpenError>,
) -> Result<(StreamChannel, Vec<StreamChannel>), OpenError> {
    let expected = usize::from(count) + 1;
    let wrong = |what: String| OpenError::Channels { address: address.to_owned(), what };
    let mut waiting = vec![accept(stop)?];
    let soon = stop.within(options.dead_peer);
    while waiting.len() < expected {
        match accept(&soon) {
            Ok(channel) => waiting.push(channel),
            Err(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
                if stop.reason().is_none() =>
            {
                let (came, after) = (waiting.len(), options.dead_peer.as_secs());
                return Err(wrong(format!("{came} of {expected} connections came within {after} s")));
            }
            Err(error) => return Err(error),
        }
    }
    let mut main = None;
    let mut pages = Vec::with_capacity(expected);
    for channel in waiting {
        let word = channel.peek_word(&stop.within(options.dead_peer.max(Duration::from_secs(1))))?;
        match u32::from_be_bytes(word) {
            file::MAGIC if main.is_none() => main = Some(channel),
            file::MAGIC => return Err(wrong("two connections begin as main channels do".into())),
            multifd::MAGIC => pages.push(channel),
            other => {
                let peer = channel.peer();
                return Err(wrong(format!("{peer} begins with {other:#010x}, as no channel does")));
            }
        }
    }
    let main = main.ok_or_else(|| wrong("all connections are page channels, none the main one".into()))?;
    Ok((main, pages))
}
