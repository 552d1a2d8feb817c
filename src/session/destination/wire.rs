//! The connection to the source: source of pages, sink for messages, and what ends a wait on it.

use std::time::Duration;

use crate::stream::qemu::return_path::Message;
use crate::sys::{CancelToken, Stop};
use crate::transport::{ChannelError, DestinationConnection, DestinationLink};

use super::return_path::ReturnPathWriter;

/// A connection, and what ends each wait on it.
pub(super) struct Wire {
    pub(super) link: Box<dyn DestinationLink>,
    /// The sink, if the connection has a return path. The source reads it after the command that opens it.
    pub(super) back: Option<ReturnPathWriter>,
    pub(super) stop: Stop,
    /// Bytes that came on page channels of earlier connections.
    beside_before: u64,
}

impl Wire {
    pub(super) fn new(connection: DestinationConnection, cancel: &CancelToken) -> Self {
        let back = connection.back.map(ReturnPathWriter::new);
        Self { link: connection.link, back, stop: Stop::on(cancel), beside_before: 0 }
    }

    /// Bytes that came on page channels, of all connections.
    pub(super) fn channel_bytes(&self) -> u64 {
        self.beside_before + self.link.channel_bytes()
    }

    /// Pages come by another link, and nothing by the present one any more.
    pub(super) fn replace(&mut self, link: Box<dyn DestinationLink>) {
        self.beside_before = self.channel_bytes();
        self.link = link;
    }

    /// Sends a message to the source within `time`, if there is a return path.
    pub(super) fn answer(&self, message: Message<'_>, time: Duration) -> Result<(), ChannelError> {
        let Some(back) = &self.back else { return Ok(()) };
        back.message(message, &self.stop.within(time))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::session::tests::plain;
    use crate::transport::InlineDestination;

    fn wire(answers: bool, cancel: &CancelToken) -> (Wire, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        let link = Box::new(InlineDestination::new(plain(&near)));
        let back = answers.then(|| plain(&near) as Box<_>);
        (Wire::new(DestinationConnection::new(link, back), cancel), far)
    }

    #[test]
    fn an_answer_leaves_whole_and_only_where_somebody_reads_it() {
        let mut pong = Vec::new();
        Message::Pong(7).encode(&mut pong);
        for (answers, expected) in [(true, pong), (false, Vec::new())] {
            let (wire, mut far) = wire(answers, &CancelToken::default());
            wire.answer(Message::Pong(7), Duration::from_secs(60)).unwrap();
            drop(wire);
            let mut came = Vec::new();
            far.read_to_end(&mut came).unwrap();
            assert_eq!(came, expected);
        }
    }

    /// The next message after a failure returns the error, instead of being lost.
    #[test]
    fn no_answer_is_taken_for_sent_on_a_connection_that_was_let_go() {
        let (wire, _far) = wire(true, &CancelToken::default());
        wire.back.as_ref().unwrap().replace(None);
        let answered = wire.answer(Message::Pong(7), Duration::from_secs(60));
        assert!(matches!(answered, Err(ChannelError::Closed { .. })), "{answered:?}");
    }
}
