//! Both ends of a byte stream inside one process, with a bounded buffer and without the kernel.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::sys::{Lock as _, RecvPart, SendPart, Stop, StopReason};
use crate::transport::{ByteSink, ByteSource, ChannelError};

/// Interval at which a wait checks its [`Stop`].
const POLL_INTERVAL: Duration = Duration::from_millis(10);
const PEER: &str = "loopback";
const SENDING: &str = "sending the stream";
const RECEIVING: &str = "waiting for the stream";

/// One end: a sending and a receiving half.
#[derive(Debug)]
pub struct Loopback {
    /// Bytes to the other end.
    pub sink: LoopbackSink,
    /// Bytes from the other end.
    pub source: LoopbackSource,
}

/// Two connected ends. In each direction at most `capacity` bytes are in flight, at least 1.
pub fn loopback(capacity: usize) -> (Loopback, Loopback) {
    let (there, from_near) = one_way(capacity);
    let (back, from_far) = one_way(capacity);
    (Loopback { sink: there, source: from_far }, Loopback { sink: back, source: from_near })
}

fn one_way(capacity: usize) -> (LoopbackSink, LoopbackSource) {
    let state = State { bytes: VecDeque::new(), open: true };
    let pipe =
        Arc::new(Pipe { state: Mutex::new(state), changed: Condvar::new(), capacity: capacity.max(1) });
    (LoopbackSink { pipe: Arc::clone(&pipe), sent: 0 }, LoopbackSource { pipe })
}

#[derive(Debug)]
struct Pipe {
    state: Mutex<State>,
    changed: Condvar,
    capacity: usize,
}

#[derive(Debug)]
struct State {
    bytes: VecDeque<u8>,
    /// Both ends are there.
    open: bool,
}

impl Pipe {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.locked()
    }

    /// Waits until `ready` returns true or an end is gone.
    fn wait(
        &self,
        doing: &'static str,
        stop: &Stop,
        ready: impl Fn(&State) -> bool,
    ) -> Result<MutexGuard<'_, State>, ChannelError> {
        let mut state = self.lock();
        loop {
            let reason = stop.reason();
            if reason != Some(StopReason::Cancelled) && (ready(&state) || !state.open) {
                return Ok(state);
            }
            if let Some(reason) = reason {
                return Err(ChannelError::Stopped { reason, doing });
            }
            state = self.changed.wait_timeout(state, POLL_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn close(&self) {
        self.lock().open = false;
        self.changed.notify_all();
    }
}

/// The sending half. When it is dropped, the stream ends for the other end.
#[derive(Debug)]
pub struct LoopbackSink {
    pipe: Arc<Pipe>,
    sent: u64,
}

impl LoopbackSink {
    fn send_bytes(&mut self, mut bytes: &[u8], stop: &Stop) -> Result<(), ChannelError> {
        while !bytes.is_empty() {
            let room = |state: &State| self.pipe.capacity - state.bytes.len();
            let mut state = self.pipe.wait(SENDING, stop, |state| room(state) > 0)?;
            if !state.open {
                return Err(ChannelError::Closed { peer: PEER.into(), doing: SENDING });
            }
            let (now, later) = bytes.split_at(room(&state).min(bytes.len()));
            state.bytes.extend(now);
            self.sent += now.len() as u64;
            self.pipe.changed.notify_all();
            bytes = later;
        }
        Ok(())
    }
}

impl crate::transport::Sealed for LoopbackSink {}

impl ByteSink for LoopbackSink {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        for part in parts {
            match part {
                SendPart::Own(bytes) => self.send_bytes(bytes, stop)?,
                SendPart::Guest(span) => {
                    let mut copy = [0; 4096];
                    let mut at = 0;
                    while let Some(rest) =
                        span.part(at, (span.len() - at).min(copy.len())).filter(|s| !s.is_empty())
                    {
                        let count = rest.copy_to(&mut copy);
                        self.send_bytes(&copy[..count], stop)?;
                        at += count;
                    }
                }
            }
        }
        Ok(())
    }

    fn flush(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }

    fn position(&self) -> u64 {
        self.sent
    }
}

impl Drop for LoopbackSink {
    fn drop(&mut self) {
        self.pipe.close();
    }
}

/// The receiving half. When it is dropped, further sends of the other end fail.
#[derive(Debug)]
pub struct LoopbackSource {
    pipe: Arc<Pipe>,
}

impl crate::transport::Sealed for LoopbackSource {}

impl ByteSource for LoopbackSource {
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        if into.iter().all(RecvPart::is_empty) {
            return Ok(0);
        }
        let mut state = self.pipe.wait(RECEIVING, stop, |state| !state.bytes.is_empty())?;
        let mut taken = 0;
        for part in into {
            let (front, _) = state.bytes.as_slices();
            let count = match part {
                RecvPart::Own(room) => {
                    let count = room.len().min(front.len());
                    room[..count].copy_from_slice(&front[..count]);
                    count
                }
                RecvPart::Guest(span) => span.copy_from(front),
            };
            let filled = count == part.len();
            state.bytes.drain(..count);
            taken += count;
            if !filled {
                break;
            }
        }
        self.pipe.changed.notify_all();
        Ok(taken)
    }
}

impl Drop for LoopbackSource {
    fn drop(&mut self) {
        self.pipe.close();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_deadline_of_zero_takes_what_is_there() {
        let (mut near, mut far) = loopback(7);
        let stop = Stop::never();
        let now = stop.within(Duration::ZERO);
        let mut room = [0; 3];
        let nothing = far.source.recv(&mut [RecvPart::Own(&mut room)], &now);
        assert!(matches!(nothing, Err(ChannelError::Stopped { reason: StopReason::Deadline, .. })));
        near.sink.send(&[SendPart::Own(&[7])], &stop).unwrap();
        assert_eq!(far.source.recv(&mut [RecvPart::Own(&mut room)], &now).unwrap(), 1);
    }

    #[test]
    fn bytes_pass_in_order_through_little_room() {
        let (mut near, mut far) = loopback(7);
        let stop = Stop::never().within(Duration::from_secs(10));
        let bytes: Vec<u8> = (0..=255).cycle().take(10_000).collect();
        let sent = bytes.clone();
        let other = stop.clone();
        let sender = std::thread::spawn(move || {
            near.sink.send(&[SendPart::Own(&sent[..1]), SendPart::Own(&sent[1..])], &other).unwrap();
            assert_eq!(near.sink.position(), 10_000);
        });
        let mut got: Vec<u8> = Vec::new();
        loop {
            let (mut one, mut two) = ([0; 3], [0; 5]);
            let count =
                far.source.recv(&mut [RecvPart::Own(&mut one), RecvPart::Own(&mut two)], &stop).unwrap();
            got.extend(one.iter().chain(&two).take(count));
            if count == 0 {
                break;
            }
        }
        sender.join().unwrap();
        assert_eq!(got, bytes);
    }

    #[test]
    fn an_end_that_left_is_noticed_and_a_wait_can_be_stopped() {
        let (mut near, far) = loopback(4);
        let stop = Stop::never();
        let short = stop.within(Duration::from_millis(5));
        let stopped = near.source.recv(&mut [RecvPart::Own(&mut [0; 4])], &short).unwrap_err();
        assert!(matches!(stopped, ChannelError::Stopped { reason: StopReason::Deadline, .. }));
        let short = stop.within(Duration::from_millis(5));
        let stopped = near.sink.send(&[SendPart::Own(&[0; 5])], &short).unwrap_err();
        assert!(matches!(stopped, ChannelError::Stopped { .. }));
        drop(far);
        let closed = near.sink.send(&[SendPart::Own(&[0])], &stop).unwrap_err();
        assert!(matches!(closed, ChannelError::Closed { .. }));
        assert_eq!(near.source.recv(&mut [RecvPart::Own(&mut [0; 4])], &stop).unwrap(), 0);
    }
}
