//! A QEMU as the source of checkpoints (COLO).

use std::time::{Duration, Instant};

use super::colo::{ColoIntake, Taken};
use super::{Arrivals, Kept, ended, out_of_turn, provided};
use crate::engine::StandbyEvent;
use crate::session::checkpoint::StandbySettings;
use crate::session::{DestinationGuest, Error};
use crate::stream::checkpoints::StandbyMessage;
use crate::stream::qemu::colo::ColoMessage;
use crate::stream::qemu::return_path::Message;
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, StreamChannel};

/// Bytes read at a time.
const BUFFER: usize = 256 << 10;
/// Longest time in which a primary takes an answer that it waits for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How much longer a checkpoint may take for each of so many bytes of RAM.
const BYTES_A_SECOND: u64 = 64 << 20;

/// The connection to a primary.
pub(super) struct FromQemu {
    channel: StreamChannel,
    intake: ColoIntake,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    max_ram: u64,
    /// How long a checkpoint may take, from its REQUEST on.
    checkpoint_timeout: Duration,
    requested: Option<Instant>,
    has_begun: bool,
}

impl FromQemu {
    pub(super) fn new(channel: StreamChannel, settings: &StandbySettings) -> Self {
        Self {
            channel,
            intake: ColoIntake::new(settings.max_state),
            buffer: vec![0; BUFFER],
            start: 0,
            end: 0,
            max_ram: settings.max_ram,
            checkpoint_timeout: settings.checkpoint_timeout,
            requested: None,
            has_begun: false,
        }
    }

    fn answer(&mut self, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.channel.send(&[SendPart::Own(bytes)], &Stop::never().within(ANSWER_TIMEOUT))?)
    }

    /// What comes next that is not only to be kept.
    fn next(&mut self, mut kept: Option<&mut Kept>, stop: &Stop) -> Result<Taken, Error> {
        loop {
            let input = self.buffer.get(self.start..self.end).unwrap_or(&[]);
            let (used, taken) = self.intake.take(input, kept.as_deref_mut())?;
            self.start += used;
            match taken {
                Taken::Kept => {}
                Taken::More(needed) => self.read(needed, stop)?,
                Taken::Ping(value) => {
                    let mut pong = Vec::new();
                    Message::Pong(value).encode(&mut pong);
                    self.answer(&pong)?;
                }
                other => return Ok(other),
            }
        }
    }

    /// The guest is paused at its primary while a checkpoint arrives: that may not take for ever, whatever comes.
    fn read(&mut self, needed: usize, stop: &Stop) -> Result<(), Error> {
        let limited;
        let stop = match self.requested {
            None => stop,
            Some(since) => {
                let Some(left) = self.checkpoint_timeout.checked_sub(since.elapsed()) else {
                    let seconds = self.checkpoint_timeout.as_secs_f32();
                    return Err(Error::PeerFailed {
                        why: format!("a checkpoint did not end within {seconds} s"),
                    });
                };
                limited = stop.within(left);
                &limited
            }
        };
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        if self.end + needed > self.buffer.len() {
            self.buffer.resize(self.end + needed, 0);
        }
        match self.channel.recv(&mut [RecvPart::Own(&mut self.buffer[self.end..])], stop)? {
            0 => Err(ended(&self.channel)),
            got => {
                self.end += got;
                Ok(())
            }
        }
    }
}

impl Arrivals for FromQemu {
    fn greet(&mut self, guest: &mut DestinationGuest, stop: &Stop) -> Result<Kept, Error> {
        let Taken::Guest = self.next(None, stop)? else {
            return Err(out_of_turn("a checkpoint", "waiting for the list of RAM blocks"));
        };
        let Some(incoming) = self.intake.incoming() else {
            return Err(out_of_turn("no blocks", "waiting for the list of RAM blocks"));
        };
        let memory = provided(guest, incoming, self.max_ram)?;
        self.checkpoint_timeout += Duration::from_secs(memory.table().total() / BYTES_A_SECOND);
        self.intake.place_in(memory)
    }

    fn receive(
        &mut self,
        kept: &mut Kept,
        guest: &mut DestinationGuest,
        _is_open: bool,
        stop: &Stop,
    ) -> Result<StandbyEvent, Error> {
        if !std::mem::replace(&mut self.has_begun, true) {
            return Ok(StandbyEvent::Opened(1));
        }
        let Taken::Tell(event, answer) = self.next(Some(kept), stop)? else {
            return Err(out_of_turn("another guest", "keeping checkpoints of a QEMU"));
        };
        if let Some(answer) = answer {
            self.answer(&answer.encode())?;
        }
        match (event, self.intake.incoming()) {
            (StandbyEvent::Whole(1), Some(incoming)) => guest.memory.arrived(incoming, false),
            (StandbyEvent::Opened(_), _) => self.requested = Some(Instant::now()),
            _ => self.requested = None,
        }
        Ok(event)
    }

    fn say(&mut self, message: StandbyMessage, _limit: Duration) -> Result<(), Error> {
        match message {
            StandbyMessage::Confirm(1) => {
                let mut ready = Vec::new();
                if self.intake.has_return_path() {
                    // A primary with a return path ends it first. It has not given its guest away: COLO follows.
                    Message::Shut { status: 0 }.encode(&mut ready);
                }
                ready.extend_from_slice(&ColoMessage::Ready.encode());
                self.answer(&ready)
            }
            StandbyMessage::Confirm(_) => self.answer(&ColoMessage::Loaded.encode()),
            // QEMU has no message for these.
            _ => Ok(()),
        }
    }

    fn hang_up(&self) {
        self.channel.breaker().close();
    }
}
