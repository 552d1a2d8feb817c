//! The connection to the modelled destination, which breaks at the planned byte.

use std::sync::Arc;
use std::time::Duration;

use super::{Fault, Shared};
use crate::session::{NewConnection, Reconnect};
use crate::stream::qemu::section::COMMAND;
use crate::sys::{RecvPart, SendPart, Stop, StopReason};
use crate::transport::{Address, ByteSink, ByteSource, ChannelError, OpenError};

/// Waits for less are looks.
const LOOK: Duration = Duration::from_secs(1);
/// Steps within which an awaited answer must arrive.
const STEPS: usize = 5000;

/// Both directions of the connection.
pub(in crate::session::sim::postcopy) struct Sink(pub(in crate::session::sim::postcopy) Shared);

/// A connection after the first.
struct Further {
    shared: Shared,
    /// Set if it is the main one; unknown before its first byte.
    main: Option<Sink>,
}

impl crate::transport::Sealed for Further {}

impl ByteSink for Further {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let bytes = bytes_of(parts);
        if self.main.is_none() {
            let mut there = self.shared.lock().unwrap();
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: "the simulation" });
            }
            if bytes.first() != Some(&COMMAND) {
                if there.cut || !there.urgent.connected {
                    return Err(closed());
                }
                there.receive_urgent(&bytes);
                return Ok(());
            }
            if !there.reconnect() {
                return Err(closed());
            }
        }
        self.main.get_or_insert_with(|| Sink(Arc::clone(&self.shared))).send(parts, stop)
    }

    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    fn position(&self) -> u64 {
        self.main.as_ref().map_or(0, Sink::position)
    }
}

fn bytes_of(parts: &[SendPart<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            SendPart::Own(own) => bytes.extend_from_slice(own),
            SendPart::Guest(span) => {
                let at = bytes.len();
                bytes.resize(at + span.len(), 0);
                span.copy_to(&mut bytes[at..]);
            }
        }
    }
    bytes
}

fn closed() -> ChannelError {
    ChannelError::Closed { peer: "the model".into(), doing: "the simulation" }
}

impl crate::transport::Sealed for Sink {}

impl ByteSink for Sink {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        let mut there = self.0.lock().unwrap();
        if let Some(reason) = stop.reason() {
            return Err(ChannelError::Stopped { reason, doing: "the simulation" });
        }
        let bytes = bytes_of(parts);
        if there.cut {
            return Err(closed());
        }
        let after = there.sent_here + bytes.len() as u64;
        if let Some(at) = there.breaks_at.filter(|at| after > *at) {
            let left = at.saturating_sub(there.sent_here) as usize;
            there.receive(&bytes[..left]);
            there.lose();
            // The sender's host accepts bytes that it can't deliver any more, until it notices the loss.
            if there.rng.one_in(2) {
                there.swallowed += (bytes.len() - left) as u64;
                there.sent_here = after;
                return Ok(());
            }
            return Err(closed());
        }
        if let Fault::Cancel(at) = there.fault
            && after > at
        {
            there.cancel.cancel();
        }
        there.receive(&bytes);
        Ok(())
    }

    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    fn position(&self) -> u64 {
        self.0.lock().unwrap().sent_here
    }
}

/// Connects again.
pub(in crate::session::sim::postcopy) struct Again(pub(in crate::session::sim::postcopy) Shared);

impl Reconnect for Again {
    fn connect(&mut self, _to: Option<&Address>, _stop: &Stop) -> Result<NewConnection, OpenError> {
        if !self.0.lock().unwrap().connect() {
            return Err(closed().into());
        }
        let back = Box::new(Sink(Arc::clone(&self.0)));
        let sink = Box::new(Further { shared: Arc::clone(&self.0), main: None });
        Ok(NewConnection { sink, back })
    }
}

impl ByteSource for Sink {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        let mut there = self.0.lock().unwrap();
        for _ in 0..STEPS {
            there.act();
            if !there.replies.is_empty() && !there.urgent.is_waited_for() {
                let Some(RecvPart::Own(room)) = into.first_mut() else { return Ok(0) };
                // Messages may come in pieces.
                let most = (there.replies.len() as u64).min(room.len() as u64);
                let count = 1 + there.rng.below(most) as usize;
                for byte in &mut room[..count] {
                    *byte = there.replies.pop_front().unwrap_or_default();
                }
                return Ok(count);
            }
            if there.cut {
                return Err(closed());
            }
            if stop.left().is_some_and(|left| left < LOOK) {
                return Err(ChannelError::Stopped { reason: StopReason::Deadline, doing: "the simulation" });
            }
        }
        there.violations.push("an answer is waited for that never comes".into());
        Err(closed())
    }
}
