//! Finds the main channel among the incoming connections, and checks their number.
//!
//! A QEMU 7.2 connects main first and the channels after it; later ones connect in any order and are distinguished by
//! their first four bytes, which older ones write as well. A ramwire sends the number of its channels on main before
//! anything that depends on them. If the number differs, it is refused immediately, while its connections still wait.

use std::time::Duration;

use crate::stream::channel_count::{ChannelMismatch, agree_on_channels};
use crate::stream::native::{Answer, GREETING, channels_of_ping};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use crate::stream::qemu::return_path::Message;
use crate::stream::qemu::{file, multifd};
use crate::sys::{RecvPart, SendPart, Stop, StopReason};
use crate::transport::open::OpenError;
use crate::transport::{ByteSink, ByteSource, ChannelError, StreamChannel, StreamOptions};

/// Longest time between two checks of what the source sends on main.
const LOOK: Duration = Duration::from_millis(50);

/// Bytes of main that are examined: header, configuration and the greeting are far shorter.
const GREETING_WITHIN: usize = 4096;

/// How long a source that is refused may take to read the refusal.
const REFUSED_WITHIN: Duration = Duration::from_secs(5);

/// What the beginning of main shows.
#[derive(Debug, PartialEq, Eq)]
enum Announced {
    /// Not enough bytes have arrived.
    Open,
    /// The source is a ramwire and has this many page channels.
    Channels(u8),
    /// It is none.
    Nothing,
}

/// The main channel and `count` page channels, each taken by `accept`. There is no time limit for the first; the others
/// must come within `options.dead_peer`, and so must the first bytes of all.
///
/// # Errors
/// [`OpenError::OtherChannels`] if the source has another number, which is then refused; [`OpenError::Channels`] if
/// fewer or more come, or none or several of them are the main channel.
pub(in crate::transport) fn accept(
    count: u8,
    address: &str,
    options: &StreamOptions,
    stop: &Stop,
    mut accept: impl FnMut(&Stop) -> Result<StreamChannel, OpenError>,
) -> Result<(StreamChannel, Vec<StreamChannel>), OpenError> {
    let expected = usize::from(count) + 1;
    let wrong = |what: String| OpenError::Channels { address: address.to_owned(), what };
    let mut came = Came::default();
    came.take(accept(stop)?, &stop.within(options.dead_peer.max(Duration::from_secs(1))))
        .map_err(wrong)??;
    let soon = stop.within(options.dead_peer);
    loop {
        // Connections that a source has left behind after it was refused.
        came.pages.retain(|channel| !was_abandoned(channel));
        match (&came.main, came.pages.len()) {
            (Some(_), pages) if pages == usize::from(count) => break,
            (Some(main), pages) => match announced(main) {
                Announced::Channels(theirs) => {
                    if let Err(mismatch) = agree_on_channels(theirs, count) {
                        return Err(came.refuse(mismatch));
                    }
                }
                Announced::Nothing if pages > usize::from(count) => {
                    return Err(wrong(format!("the source has more than {count} page channels")));
                }
                _ => {}
            },
            (None, pages) if pages > usize::from(u8::MAX) => {
                return Err(wrong("all connections are page channels, none the main one".into()));
            }
            _ => {}
        }
        match accept(&soon.within(LOOK)) {
            Ok(channel) => came.take(channel, &soon).map_err(wrong)??,
            Err(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
                if soon.reason().is_none() => {}
            Err(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
                if stop.reason().is_none() =>
            {
                let after = options.dead_peer.as_secs();
                return Err(wrong(match (came.main.is_some(), came.pages.len()) {
                    (false, pages) if pages >= expected => {
                        "all connections are page channels, none the main one".into()
                    }
                    (main, pages) => {
                        let came = usize::from(main) + pages;
                        format!("{came} of {expected} connections came within {after} s")
                    }
                }));
            }
            Err(error) => return Err(error),
        }
    }
    let Came { main, pages } = came;
    let main = main.ok_or_else(|| wrong("none of the connections is the main one".into()))?;
    Ok((main, pages))
}

/// The connections of one source.
#[derive(Default)]
struct Came {
    main: Option<StreamChannel>,
    pages: Vec<StreamChannel>,
}

impl Came {
    /// Assigns a connection by its first word; returns the reason as text if this is not possible.
    fn take(&mut self, channel: StreamChannel, stop: &Stop) -> Result<Result<(), OpenError>, String> {
        let word = match channel.peek_word(stop) {
            Ok(word) => u32::from_be_bytes(word),
            Err(error) => return Ok(Err(error.into())),
        };
        match word {
            file::MAGIC if self.main.is_none() => self.main = Some(channel),
            file::MAGIC => return Err("two connections begin as main channels do".into()),
            multifd::MAGIC => self.pages.push(channel),
            other => {
                let peer = channel.peer();
                return Err(format!("{peer} begins with {other:#010x}, as no channel does"));
            }
        }
        Ok(Ok(()))
    }

    /// Sends the reason of the refusal to the source. The page channels stay open until the source has read it: closing
    /// them would only break its connections.
    fn refuse(self, mismatch: ChannelMismatch) -> OpenError {
        let why = mismatch.to_string();
        let sent = self.main.map_or(Ok(()), |main| tell_refused(main, &why));
        if let Err(error) = sent {
            tracing::warn!(%error, "the source may not know why it was refused");
        }
        mismatch.into()
    }
}

/// True for a page channel that was closed after its first packet: it carries no pages.
fn was_abandoned(channel: &StreamChannel) -> bool {
    let come = channel.peek(&mut [0; multifd::INIT_LEN + 1]);
    channel.has_been_closed() && come.is_ok_and(|come| come <= multifd::INIT_LEN)
}

/// Whether main begins with a ramwire's greeting, which is left to be read later.
fn announced(main: &StreamChannel) -> Announced {
    let mut head = [0; GREETING_WITHIN];
    // If the connection has failed, the next read returns the error.
    let have = main.peek(&mut head).unwrap_or(0);
    let mut stream = IncomingStream::new(IncomingConfig::default());
    let (mut at, mut greeted) = (0, false);
    while let Ok(step) = stream.next(&head[at..have]) {
        match step {
            Step::NeedMore { .. } if have < head.len() => return Announced::Open,
            Step::NeedMore { .. } => return Announced::Nothing,
            Step::Event { consumed, event } => {
                at += consumed;
                match event {
                    Event::Configuration(_) | Event::Command(Command::OpenReturnPath) => {}
                    Event::Command(Command::Ping(GREETING)) => greeted = true,
                    Event::Command(Command::Ping(value)) if greeted => {
                        return channels_of_ping(value).map_or(Announced::Nothing, Announced::Channels);
                    }
                    _ => return Announced::Nothing,
                }
            }
        }
    }
    Announced::Nothing
}

/// Sends REFUSED and waits until the source has closed: closing with unread bytes would be a reset, which may overtake
/// the message.
fn tell_refused(mut main: StreamChannel, why: &str) -> Result<(), ChannelError> {
    let stop = Stop::never().within(REFUSED_WITHIN);
    let mut refused = Vec::new();
    Message::Native(Answer::Refused { why }).encode(&mut refused);
    main.send(&[SendPart::Own(&refused)], &stop)?;
    let mut rest = [0; GREETING_WITHIN];
    // recv returns bytes that have arrived even after a deadline, so the deadline is checked as well.
    while stop.reason().is_none() && main.recv(&mut [RecvPart::Own(&mut rest)], &stop)? > 0 {}
    Ok(())
}
