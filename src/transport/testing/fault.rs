//! Faults at chosen bytes of a stream, to test how both ends react.

use std::io;
use std::time::Duration;

use super::Random;
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, ChannelError, ReadHints, StreamBreaker};

const PEER: &str = "fault injection";
const DOING: &str = "carrying the stream";
/// Longest sleep of a hang between two checks of its [`Stop`].
const HANG: Duration = Duration::from_secs(3600);

/// What happens to a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FaultKind {
    /// The connection closes in order.
    Cut,
    /// The connection breaks, with a reset if possible.
    Reset,
    /// This end moves no more bytes but keeps the connection open: it is half open.
    Hang,
    /// Bit `.0` (modulo 8) of the byte is flipped.
    FlipBit(u8),
    /// The byte is late.
    Delay(Duration),
}

/// A fault and the byte at which it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Bytes that pass before it.
    pub at: u64,
    /// What happens then.
    pub kind: FaultKind,
}

impl Fault {
    /// The fault for `seed`, at one of the first `within` bytes.
    pub fn seeded(seed: u64, within: u64) -> Self {
        let at = Random(seed).draw() % within.max(1);
        let draw = Random(seed ^ u64::MAX).draw();
        let kind = match draw % 5 {
            0 => FaultKind::Cut,
            1 => FaultKind::Reset,
            2 => FaultKind::Hang,
            3 => FaultKind::FlipBit((draw >> 8) as u8),
            _ => FaultKind::Delay(Duration::from_millis((draw >> 8) % 50)),
        };
        Self { at, kind }
    }
}

/// A sink or a source with faults. Bytes are counted in the direction in which it is used.
#[derive(Debug)]
pub struct Faulty<T> {
    /// Gone after a cut.
    inner: Option<T>,
    /// The next one last.
    faults: Vec<Fault>,
    at: u64,
    breaker: Option<StreamBreaker>,
}

/// What happens to the bytes before the next fault.
enum Next {
    /// So many bytes pass unharmed.
    Pass(u64),
    /// One byte passes with this mask applied.
    Flip(u8),
}

impl<T> Faulty<T> {
    /// Wraps `inner`. `breaker` is that of the connection, if another half of it exists elsewhere.
    pub fn new(inner: T, faults: impl IntoIterator<Item = Fault>, breaker: Option<StreamBreaker>) -> Self {
        let mut faults: Vec<_> = faults.into_iter().collect();
        faults.sort_by_key(|fault| std::cmp::Reverse(fault.at));
        Self { inner: Some(inner), faults, at: 0, breaker }
    }

    /// Triggers the faults that are due at this byte.
    fn next(&mut self, stop: &Stop) -> Result<(&mut T, Next), ChannelError> {
        let mut next = Next::Pass(u64::MAX);
        while let Some(fault) = self.faults.last().copied() {
            if fault.at > self.at {
                next = Next::Pass(fault.at - self.at);
                break;
            }
            match fault.kind {
                FaultKind::Cut => return Err(self.cut()),
                FaultKind::Reset => return Err(self.reset()),
                FaultKind::Hang => loop {
                    if let Some(reason) = stop.sleep(HANG) {
                        return Err(ChannelError::Stopped { reason, doing: DOING });
                    }
                },
                FaultKind::Delay(time) => {
                    self.faults.pop();
                    if let Some(reason) = stop.sleep(time) {
                        return Err(ChannelError::Stopped { reason, doing: DOING });
                    }
                }
                FaultKind::FlipBit(bit) => {
                    self.faults.pop();
                    next = Next::Flip(1 << (bit % 8));
                    break;
                }
            }
        }
        match &mut self.inner {
            Some(inner) => Ok((inner, next)),
            None => Err(ChannelError::Closed { peer: PEER.into(), doing: DOING }),
        }
    }

    fn cut(&mut self) -> ChannelError {
        if let Some(breaker) = &self.breaker {
            breaker.close();
        }
        self.inner = None;
        ChannelError::Closed { peer: PEER.into(), doing: DOING }
    }

    fn reset(&mut self) -> ChannelError {
        if let Some(breaker) = &self.breaker {
            breaker.reset();
        }
        self.inner = None;
        let source = io::Error::from(io::ErrorKind::ConnectionReset);
        ChannelError::Io { peer: PEER.into(), doing: DOING, source }
    }
}

impl<T> crate::transport::Sealed for Faulty<T> {}

impl<T: ByteSink> ByteSink for Faulty<T> {
    fn send(&mut self, parts: &[SendPart<'_>], stop: &Stop) -> Result<(), ChannelError> {
        for part in parts {
            let mut from = 0;
            while from < part.len() {
                let left = part.len() - from;
                let (inner, next) = self.next(stop)?;
                let count = match next {
                    Next::Pass(count) => {
                        let count = usize::try_from(count).unwrap_or(usize::MAX).min(left);
                        inner.send(&[piece(part, from, count)], stop)?;
                        count
                    }
                    Next::Flip(mask) => {
                        inner.send(&[SendPart::Own(&[byte_of(part, from) ^ mask])], stop)?;
                        1
                    }
                };
                from += count;
                self.at += count as u64;
            }
        }
        // A fault directly after the last byte happens now instead of at a send that may never come; a flip needs the
        // byte.
        match self.faults.last() {
            Some(Fault { kind: FaultKind::FlipBit(_), .. }) => Ok(()),
            _ => self.next(stop).map(drop),
        }
    }

    fn flush(&mut self, stop: &Stop) -> Result<(), ChannelError> {
        match &mut self.inner {
            Some(inner) => inner.flush(stop),
            None => Err(ChannelError::Closed { peer: PEER.into(), doing: DOING }),
        }
    }

    fn position(&self) -> u64 {
        self.at
    }

    fn unacknowledged(&self) -> u64 {
        self.inner.as_ref().map_or(0, ByteSink::unacknowledged)
    }
}

fn piece<'a>(part: &SendPart<'a>, from: usize, count: usize) -> SendPart<'a> {
    match part {
        SendPart::Own(bytes) => SendPart::Own(&bytes[from..from + count]),
        SendPart::Guest(span) => span.part(from, count).map_or(SendPart::Own(&[]), SendPart::Guest),
    }
}

fn byte_of(part: &SendPart<'_>, at: usize) -> u8 {
    match part {
        SendPart::Own(bytes) => bytes[at],
        SendPart::Guest(span) => {
            let mut byte = [0];
            span.part(at, 1).map(|span| span.copy_to(&mut byte));
            byte[0]
        }
    }
}

impl<T: ByteSource> ByteSource for Faulty<T> {
    /// Fills the first part that has room.
    fn recv(&mut self, into: &mut [RecvPart<'_>], stop: &Stop) -> Result<usize, ChannelError> {
        let Some(room) = into.iter_mut().find(|part| !part.is_empty()) else { return Ok(0) };
        let (inner, next) = self.next(stop)?;
        let count = match next {
            Next::Pass(count) => {
                let count = usize::try_from(count).unwrap_or(usize::MAX).min(room.len());
                let room = match room {
                    RecvPart::Own(bytes) => RecvPart::Own(&mut bytes[..count]),
                    RecvPart::Guest(span) => {
                        span.part(0, count).map_or(RecvPart::Own(&mut []), RecvPart::Guest)
                    }
                };
                inner.recv(&mut [room], stop)?
            }
            Next::Flip(mask) => {
                let mut byte = [0];
                let count = inner.recv(&mut [RecvPart::Own(&mut byte)], stop)?;
                byte[0] ^= mask;
                match room {
                    RecvPart::Own(bytes) => bytes[..count].copy_from_slice(&byte[..count]),
                    RecvPart::Guest(span) => drop(span.copy_from(&byte[..count])),
                }
                count
            }
        };
        self.at += count as u64;
        Ok(count)
    }

    fn set_hints(&mut self, hints: ReadHints) {
        if let Some(inner) = &mut self.inner {
            inner.set_hints(hints);
        }
    }

    fn tolerate_outage(&mut self, limit: Duration) {
        if let Some(inner) = &mut self.inner {
            inner.tolerate_outage(limit);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transport::loopback;

    fn stop() -> Stop {
        Stop::never().within(Duration::from_secs(10))
    }

    fn read_all(source: &mut impl ByteSource) -> (Vec<u8>, Result<(), ChannelError>) {
        let (mut got, mut room) = (Vec::new(), [0; 16]);
        loop {
            match source.recv(&mut [RecvPart::Own(&mut room)], &stop()) {
                Ok(0) => return (got, Ok(())),
                Ok(count) => got.extend(&room[..count]),
                Err(error) => return (got, Err(error)),
            }
        }
    }

    const BYTES: [u8; 8] = [10, 11, 12, 13, 14, 15, 16, 17];

    #[test]
    fn exactly_the_bytes_before_a_cut_arrive() {
        for at in 0..=8 {
            let (near, mut far) = loopback(64);
            let cut = Fault { at, kind: FaultKind::Cut };
            let mut sink = Faulty::new(near.sink, [cut], None);
            let parts = [SendPart::Own(&BYTES[..3]), SendPart::Own(&BYTES[3..])];
            assert!(matches!(sink.send(&parts, &stop()), Err(ChannelError::Closed { .. })));
            assert_eq!(sink.position(), at);
            assert_eq!(read_all(&mut far.source).0, BYTES[..at as usize]);
            assert!(matches!(sink.send(&parts, &stop()), Err(ChannelError::Closed { .. })));
        }
    }

    #[test]
    fn one_bit_is_flipped_on_either_side() {
        for at in 0..8 {
            let flip = Fault { at, kind: FaultKind::FlipBit(9) };
            let late = Fault { at, kind: FaultKind::Delay(Duration::from_millis(1)) };
            let mut expected = BYTES;
            expected[at as usize] ^= 2;
            let (near, mut far) = loopback(64);
            let mut sink = Faulty::new(near.sink, [flip, late], None);
            sink.send(&[SendPart::Own(&BYTES)], &stop()).unwrap();
            drop(sink);
            assert_eq!(read_all(&mut far.source).0, expected);
            let (mut near, far) = loopback(64);
            near.sink.send(&[SendPart::Own(&BYTES)], &stop()).unwrap();
            drop(near);
            assert_eq!(read_all(&mut Faulty::new(far.source, [flip], None)).0, expected);
        }
    }

    #[test]
    fn a_hang_lasts_until_it_is_stopped_and_a_reset_says_so() {
        let (mut near, far) = loopback(64);
        near.sink.send(&[SendPart::Own(&BYTES)], &stop()).unwrap();
        let hang = Fault { at: 8, kind: FaultKind::Hang };
        let mut source = Faulty::new(far.source, [hang], None);
        let mut room = [0; 8];
        assert_eq!(source.recv(&mut [RecvPart::Own(&mut room)], &stop()).unwrap(), 8);
        let short = stop().within(Duration::from_millis(20));
        let hung = source.recv(&mut [RecvPart::Own(&mut room)], &short);
        assert!(matches!(hung, Err(ChannelError::Stopped { .. })));
        let reset = Fault { at: 0, kind: FaultKind::Reset };
        let error = Faulty::new(far.sink, [reset], None).send(&[SendPart::Own(&BYTES)], &stop()).unwrap_err();
        assert!(
            matches!(error, ChannelError::Io { source, .. } if source.kind() == io::ErrorKind::ConnectionReset)
        );
    }

    #[test]
    fn seeds_draw_every_kind_at_spread_places() {
        let drawn: Vec<_> = (0..200).map(|seed| Fault::seeded(seed, 1000)).collect();
        assert!(drawn.iter().all(|fault| fault.at < 1000));
        let count = |wanted: fn(&FaultKind) -> bool| drawn.iter().filter(|fault| wanted(&fault.kind)).count();
        assert!(count(|kind| matches!(kind, FaultKind::Cut)) > 20);
        assert!(count(|kind| matches!(kind, FaultKind::Reset)) > 20);
        assert!(count(|kind| matches!(kind, FaultKind::Hang)) > 20);
        assert!(count(|kind| matches!(kind, FaultKind::FlipBit(_))) > 20);
        assert!(count(|kind| matches!(kind, FaultKind::Delay(_))) > 20);
        assert!(drawn.iter().filter(|fault| fault.at < 500).count() > 70);
    }
}
