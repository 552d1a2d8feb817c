//! The source's queue pairs: posting, completions and received messages.

use super::{KEEPALIVE_INTERVAL, Round, SourceHooks};
use crate::channel::Channel;
use crate::control::{Kind, Message};
use crate::hooks::HooksError;
use crate::stop::Stop;

impl SourceHooks {
    pub(super) fn channel(&mut self, queue: usize) -> &mut Channel {
        match queue.checked_sub(1) {
            Some(data) => &mut self.main.data_queues[data],
            None => &mut self.main.channel,
        }
    }

    /// Sleeps until an event on a queue pair; polls the others.
    pub(super) fn rest(&mut self, queue: usize, stop: &Stop) -> Result<(), HooksError> {
        let now = self.channel(queue).clock_read_at();
        for other in (0..self.queue_pairs()).filter(|other| *other != queue) {
            // The next pump checks the messages that the main queue pair has received.
            self.channel(other).watch(now)?;
        }
        self.channel(queue).rest(stop)
    }

    /// A queue pair with something in flight.
    pub(super) fn busiest(&self) -> usize {
        self.main.data_queues.iter().position(|channel| !channel.is_idle()).map_or(0, |index| index + 1)
    }

    /// Posts gathered writes to the device.
    pub(super) fn ring(&mut self) -> Result<(), HooksError> {
        self.main.channel.ring()?;
        self.main.data_queues.iter_mut().try_for_each(Channel::ring)
    }

    /// Processes completions and messages of all queue pairs; true if there were any.
    pub(super) fn pump(&mut self) -> Result<bool, HooksError> {
        let mut news = self.main.pump()?;
        for channel in &mut self.main.data_queues {
            news |= channel.pump_data()?;
            if channel.has_arrived() {
                return Err(HooksError::unexpected(Kind::Stream, "a queue pair carries only writes"));
            }
        }
        self.settle();
        self.take_keys_ahead()?;
        self.send_gathered_if_ready()?;
        self.send_keepalive()?;
        Ok(news)
    }

    /// The destination does not see a round's writes. If it asked for keepalives, one is sent after a second without
    /// any other message. If there is no credit, the destination still has an unprocessed message, which shows the
    /// same.
    pub(super) fn send_keepalive(&mut self) -> Result<(), HooksError> {
        let wanted = self.granted.extension.is_some_and(|extension| extension.features.keepalives);
        if !wanted || !matches!(self.round, Round::Open(_)) {
            return Ok(());
        }
        let latest = self.main.data_queues.iter().map(Channel::clock_read_at).max();
        let now = self.main.channel.clock_read_at().max(latest.unwrap_or(self.main.channel.clock_read_at()));
        let silent = now.saturating_duration_since(self.main.channel.last_sent_at());
        if silent >= KEEPALIVE_INTERVAL && self.main.can_send_now() {
            self.main.send(&Message::Alive, &Stop::default())?;
        }
        Ok(())
    }

    /// Records the completed requests.
    pub(super) fn settle(&mut self) {
        let channels = std::iter::once(&mut self.main.channel).chain(&mut self.main.data_queues);
        for note in channels.flat_map(|channel| channel.retired.drain(..)) {
            if let Some(span) = note.span {
                self.spans.retired(span);
            }
            if let Some(count) = self.chunk_flights.get_mut(&(note.block, note.chunk)) {
                *count -= 1;
                if *count == 0 {
                    self.chunk_flights.remove(&(note.block, note.chunk));
                }
            }
        }
        self.zeros.settle(|message| self.main.is_finished(message));
    }
}
