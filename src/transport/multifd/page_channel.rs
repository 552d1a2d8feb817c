//! A byte stream that carries packets of guest pages, sent by copy, by reference, or lent to the kernel.

use std::os::fd::AsFd;
use std::sync::{Arc, OnceLock};

use super::splice::{SpliceTally, Splicing};
use super::zerocopy::{Lending, ZeroCopyTally};
use crate::observe::{SpliceCounts, ZeroCopyCounts};
use crate::sys::{SendPart, Stop, allow_zero_copy};
use crate::transport::{ByteSink, ChannelError, StreamChannel};

/// How guest pages get into a socket's queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageSending {
    /// The kernel copies them (`sendmsg(2)`).
    #[default]
    Copy,
    /// By reference (`vmsplice(2)` and `splice(2)`), also on the loopback.
    Splice,
    /// Lent, with a receipt when the kernel no longer uses them (MSG_ZEROCOPY); on the loopback the kernel copies.
    ZeroCopy,
}

impl std::str::FromStr for PageSending {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "copy" => Ok(Self::Copy),
            "splice" => Ok(Self::Splice),
            "zerocopy" => Ok(Self::ZeroCopy),
            _ => Err("write copy, splice or zerocopy".into()),
        }
    }
}

impl std::fmt::Display for PageSending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Copy => "copy",
            Self::Splice => "splice",
            Self::ZeroCopy => "zerocopy",
        })
    }
}

/// A sending method that can be disabled permanently, with the first reason for it.
#[derive(Debug)]
pub(super) struct Switch {
    what: &'static str,
    off: OnceLock<String>,
}

impl Switch {
    pub(super) fn named(what: &'static str) -> Self {
        Self { what, off: OnceLock::new() }
    }

    pub(super) fn is_on(&self) -> bool {
        self.off.get().is_none()
    }

    pub(super) fn turn_off(&self, why: impl Into<String>) {
        let why = why.into();
        if self.is_on() {
            tracing::info!(why, "{} is off", self.what);
        }
        // The first reason counts.
        let _ = self.off.set(why);
    }

    pub(super) fn why_off(&self) -> Option<String> {
        self.off.get().cloned()
    }
}

/// Counters of the methods other than copies, for all channels of a connection.
#[derive(Clone, Debug)]
pub(super) enum Tally {
    Copy,
    Splice(Arc<SpliceTally>),
    ZeroCopy(Arc<ZeroCopyTally>),
}

impl Tally {
    pub(super) fn of(sending: PageSending) -> Self {
        match sending {
            PageSending::Copy => Self::Copy,
            PageSending::Splice => Self::Splice(Arc::default()),
            PageSending::ZeroCopy => Self::ZeroCopy(Arc::default()),
        }
    }

    pub(super) fn spliced(&self) -> Option<SpliceCounts> {
        if let Self::Splice(tally) = self { Some(tally.counts()) } else { None }
    }

    pub(super) fn zero_copy(&self) -> Option<ZeroCopyCounts> {
        if let Self::ZeroCopy(tally) = self { Some(tally.counts()) } else { None }
    }
}

/// A channel that sends its pages by the best available method, as long as that pays.
#[derive(Debug)]
pub(super) struct PageChannel {
    channel: StreamChannel,
    way: SendPath,
}

#[derive(Debug)]
enum SendPath {
    Copy,
    Splice(Splicing),
    Lend(Lending),
}

impl PageChannel {
    /// Uses copies if the kernel does not support the tally's method.
    pub(super) fn new(channel: StreamChannel, tally: &Tally) -> Self {
        let way = match tally {
            Tally::Copy => SendPath::Copy,
            Tally::Splice(tally) => Splicing::over(&channel, tally).map_or(SendPath::Copy, SendPath::Splice),
            Tally::ZeroCopy(tally) => match allow_zero_copy(channel.end().0.fd.as_fd()) {
                Ok(()) => SendPath::Lend(Lending::new(Arc::clone(tally))),
                Err(error) => {
                    tally.switch.turn_off(format!("{} can't: {error}", channel.peer()));
                    SendPath::Copy
                }
            },
        };
        Self { channel, way }
    }

    pub(super) fn peer(&self) -> &str {
        self.channel.peer()
    }

    /// Bytes sent so far.
    pub(super) fn position(&self) -> u64 {
        self.channel.position()
    }

    /// True while the kernel may read pages after they are sent: no other bytes may be in the same call.
    pub(super) fn sends_apart(&self) -> bool {
        match &self.way {
            SendPath::Copy => false,
            SendPath::Splice(splicing) => splicing.is_on(),
            SendPath::Lend(lending) => lending.is_on(),
        }
    }

    /// Sends bytes by copy. `more`: pages follow immediately.
    pub(super) fn send(
        &mut self,
        parts: &[SendPart<'_>],
        more: bool,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        match &mut self.way {
            SendPath::Copy => self.channel.send(parts, stop),
            SendPath::Splice(splicing) => splicing.send_head(&mut self.channel, parts, more, stop),
            SendPath::Lend(lending) => lending.send_copied(&mut self.channel, parts, stop),
        }
    }

    /// Sends guest pages. The kernel may read lent pages until [`is_done`](Self::is_done) returns true for the returned
    /// mark.
    pub(super) fn send_pages(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<u64, ChannelError> {
        match &mut self.way {
            SendPath::Copy => self.channel.send(parts, stop).map(|()| 0),
            SendPath::Splice(splicing) => splicing.send_pages(&mut self.channel, parts, stop).map(|()| 0),
            SendPath::Lend(lending) => lending.lend(&mut self.channel, parts, stop),
        }
    }

    /// Announces that nothing follows, if the connection has a message for it.
    pub(super) fn send_end(&self) {
        self.channel.say_end_at_once();
    }

    /// True if the kernel no longer uses any pages up to `mark`. Checks for receipts and does not wait.
    pub(super) fn is_done(&mut self, mark: u64) -> Result<bool, ChannelError> {
        match &mut self.way {
            SendPath::Copy | SendPath::Splice(_) => Ok(true),
            SendPath::Lend(lending) => lending.is_done(&self.channel, mark),
        }
    }

    /// Waits until some lent pages are returned, if there are any.
    pub(super) fn await_some(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        match &mut self.way {
            SendPath::Copy | SendPath::Splice(_) => Ok(()),
            SendPath::Lend(lending) => lending.await_some(&self.channel, stop),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_have_names() {
        for way in [PageSending::Copy, PageSending::Splice, PageSending::ZeroCopy] {
            assert_eq!(way.to_string().parse(), Ok(way));
        }
        assert!("lend".parse::<PageSending>().is_err());
    }
}
