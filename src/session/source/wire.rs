//! The connection to the destination: sink for pages and bytes, source of messages, and the time limits of waits.

use std::time::Duration;

use crate::observe::DeltaCounts;
use crate::stream::qemu::command::Command;
use crate::sys::{SendPart, Stop};
use crate::transport::{ChannelError, SourceLink};

use super::SourceConnection;
use super::return_path::ReturnPath;
use super::setup::ORDINARY_PING;
use super::urgent::Urgent;

/// A connection, and what ends each wait on it.
pub(super) struct Wire {
    pub(super) link: Box<dyn SourceLink>,
    pub(super) back: Option<ReturnPath>,
    pub(super) stop: Stop,
    /// The connection for requested pages, if it is separate.
    pub(super) urgent: Option<Urgent>,
    /// When bytes were last sent to a peer that waits for more.
    last_keepalive: Duration,
    /// Bytes that were sent on earlier connections, and those of them on page channels.
    sent_before: u64,
    beside_before: u64,
    /// What deltas did there.
    deltas_before: DeltaCounts,
}

impl Wire {
    pub(super) fn new(connection: SourceConnection, stop: Stop) -> Self {
        let back = connection.back.map(ReturnPath::new);
        Self {
            link: connection.link,
            back,
            stop,
            urgent: None,
            last_keepalive: Duration::ZERO,
            sent_before: 0,
            beside_before: 0,
            deltas_before: DeltaCounts::default(),
        }
    }

    pub(super) fn send(&mut self, bytes: &[u8]) -> Result<(), ChannelError> {
        self.link.sink().send(&[SendPart::Own(bytes)], &self.stop)
    }

    pub(super) fn flush(&mut self) -> Result<(), ChannelError> {
        self.link.sink().flush(&self.stop)
    }

    /// Bytes sent so far, on all channels.
    pub(super) fn position(&mut self) -> u64 {
        let urgent = self.urgent.as_ref().map_or(0, Urgent::position);
        self.sent_before + self.link.sink().position() + self.link.channel_bytes() + urgent
    }

    /// Bytes on page channels so far.
    pub(super) fn channel_bytes(&self) -> u64 {
        self.beside_before + self.link.channel_bytes()
    }

    /// What deltas did so far, on all connections.
    pub(super) fn deltas(&self) -> DeltaCounts {
        self.deltas_before.followed_by(self.link.deltas())
    }

    /// Continues over another connection; the counts continue.
    pub(super) fn replace(&mut self, link: Box<dyn SourceLink>, back: Option<ReturnPath>) {
        self.sent_before = self.position();
        self.beside_before = self.channel_bytes();
        self.deltas_before = self.deltas();
        (self.link, self.back, self.urgent) = (link, back, None);
    }

    /// Sends a PING if none was sent for `every`: a ramwire treats a long silence as a dead peer, and both kinds of
    /// peer answer a PING between sections.
    pub(super) fn send_keepalive(&mut self, now: Duration, every: Duration) -> Result<(), ChannelError> {
        if self.back.is_none() || now.saturating_sub(self.last_keepalive) < every {
            return Ok(());
        }
        self.last_keepalive = now;
        let mut ping = Vec::new();
        Command::Ping(ORDINARY_PING).encode(&mut ping);
        self.send(&ping)?;
        self.flush()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::session::tests::{guest, plain};
    use crate::sys::CancelToken;
    use crate::transport::InlineLink;

    fn wire(answers: bool) -> (Wire, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let link = Box::new(InlineLink::new(plain(&near), guest(&[1])));
        let back = answers.then(|| plain(&near) as Box<_>);
        (Wire::new(SourceConnection::new(link, back), Stop::on(&CancelToken::default())), far)
    }

    #[test]
    fn a_keepalive_leaves_once_an_interval_and_only_where_somebody_answers() {
        let secs = Duration::from_secs;
        let mut ping = Vec::new();
        Command::Ping(ORDINARY_PING).encode(&mut ping);
        for (answers, pings) in [(true, 3), (false, 0)] {
            let (mut wire, _far) = wire(answers);
            for now in [0, 4, 5, 6, 9, 10, 14, 20] {
                wire.send_keepalive(secs(now), secs(5)).unwrap();
            }
            assert_eq!(wire.position(), pings * ping.len() as u64, "answers: {answers}");
        }
    }

    #[test]
    fn the_position_counts_what_was_sent() {
        let (mut wire, _far) = wire(true);
        wire.send(b"seven b").unwrap();
        wire.flush().unwrap();
        assert_eq!(wire.position(), 7);
    }
}
