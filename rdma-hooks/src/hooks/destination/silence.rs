//! How long a source may be silent in an open round.

use std::time::{Duration, Instant};

use super::DestinationHooks;
use crate::control::Message;
use crate::hooks::HooksError;
use crate::stop::{Stop, Stopped};

/// Number of checks of a silent source's round before the connection fails; they are also at most this far apart.
const MIN_CHECKS: u32 = 4;
const MAX_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Data that may be in flight before a message: 8 MiB on a link of 1 MiB/s.
const ON_ITS_WAY: Duration = Duration::from_secs(8);
/// Factor on the allowed silence of a source that sends no keepalives, if its writes aren't counted: its last round may
/// take as long as the downtime limit that its operator set.
const UNSEEN_FACTOR: u32 = 10;
/// Slowest memory registration that counts as progress, in bytes a second.
const PINNED_PER_SECOND: u64 = 128 << 20;

impl DestinationHooks {
    /// Waits for the next message of an open round. Only the state of the queue pair shows that writes arrive: the NIC
    /// of a source whose process is stopped still answers probes. `None`: `pause` has passed.
    pub(super) fn next_request(
        &mut self,
        stop: &Stop,
        pause: Duration,
    ) -> Result<Option<(usize, Message<'static>)>, HooksError> {
        let began = self.stream.channel.now();
        let check = self.silence.map_or(pause, |silence| (silence / MIN_CHECKS).min(MAX_CHECK_INTERVAL));
        loop {
            let slice = stop.within(self.stream.channel.now(), check.min(pause));
            match self.stream.request(&slice) {
                Err(HooksError::Stopped(Stopped::Deadline)) => {}
                request => {
                    self.quiet = None;
                    return request.map(Some);
                }
            }
            let now = self.stream.channel.now();
            stop.check(now)?;
            self.check_silence(now)?;
            if now.saturating_duration_since(began) >= pause {
                return Ok(None);
            }
        }
    }

    /// No message has come for a while: does the source write?
    fn check_silence(&mut self, now: Instant) -> Result<(), HooksError> {
        let Some(silence) = self.silence else { return Ok(()) };
        let mark = self.received_mark();
        let (before, since) = *self.quiet.get_or_insert((mark, now));
        if mark != before {
            self.quiet = Some((mark, now));
            return Ok(());
        }
        let silence = silence.saturating_add(self.registering());
        // A device that has not counted the stream's messages does not count.
        let after = match (mark != self.mark, self.expects_keepalives()) {
            (true, _) => silence,
            (false, true) => silence.saturating_add(ON_ITS_WAY),
            (false, false) => silence.saturating_mul(UNSEEN_FACTOR),
        };
        // If this end was stopped meanwhile, the source's messages have arrived by now.
        if now.saturating_duration_since(since) >= after && !self.stream.has_input()? {
            return Err(HooksError::Silent { after });
        }
        Ok(())
    }

    /// In the setup round with pin-all the source registers all its memory, and meanwhile sends and writes nothing.
    fn registering(&self) -> Duration {
        let everything = self.granted.pin_all && self.rounds == 1;
        let announced = self.blocks.announced().iter().filter(|_| everything);
        Duration::from_secs(announced.map(|block| block.region.len()).sum::<u64>() / PINNED_PER_SECOND)
    }

    /// Sum over all queue pairs of what the devices have received: it changes if any of them receives.
    pub(super) fn received_mark(&self) -> Option<u64> {
        let channels = std::iter::once(&self.stream.channel).chain(&self.stream.data_queues);
        channels.map(|channel| channel.endpoint().received_mark()).sum()
    }
}
