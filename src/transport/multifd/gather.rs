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
    let wrong = |what: String| OpenError::Channels { address: address.to_owned(), what };
    let (mut main, mut pages) = (None, Vec::with_capacity(usize::from(count)));
    // The first may take its time.
    let mut soon: Option<Stop> = None;
    // A source with more channels than are expected here has its main channel among them: it is waited for, so that both
    // ends can say what differs.
    while main.is_none() || pages.len() < usize::from(count) {
        let channel = match accept(soon.as_ref().unwrap_or(stop)) {
            Ok(channel) => channel,
            Err(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
                if stop.reason().is_none() =>
            {
                let (expected, after) = (usize::from(count) + 1, options.dead_peer.as_secs());
                let came = pages.len() + usize::from(main.is_some());
                return Err(wrong(match main {
                    None if came >= expected => "all connections are page channels, none the main one".into(),
                    _ => format!("{came} of {expected} connections came within {after} s"),
                }));
            }
            Err(error) => return Err(error),
        };
        let word = channel.peek_word(&stop.within(options.dead_peer.max(Duration::from_secs(1))))?;
        match u32::from_be_bytes(word) {
            file::MAGIC if main.is_none() => main = Some(channel),
            file::MAGIC => return Err(wrong("two connections begin as main channels do".into())),
            multifd::MAGIC if pages.len() < usize::from(count) => pages.push(channel),
            // Closed: nobody would read it.
            multifd::MAGIC => {
                tracing::warn!(peer = channel.peer(), count, "a page channel more than expected is closed")
            }
            other => {
                let peer = channel.peer();
                return Err(wrong(format!("{peer} begins with {other:#010x}, as no channel does")));
            }
        }
        soon.get_or_insert_with(|| stop.within(options.dead_peer));
    }
    let main = main.ok_or_else(|| wrong("all connections are page channels, none the main one".into()))?;
    Ok((main, pages))
}
