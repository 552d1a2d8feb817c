//! A proxy between two ends that acts once, at a place in the stream.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, SectionKind, Step};
use ramwire::stream::qemu::section::Phase;

/// When the proxy between the two ends acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum When {
    /// This many bytes have passed towards the destination.
    Bytes(u64),
    /// The stream has reached this position.
    Reaches(Place),
    /// The source has ended. Everything passed, with the lowest bit of the byte at this position flipped.
    Flip(u64),
    /// The source sends nothing more. The destination's answers are held back until then.
    Silence,
}

/// A place in a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// After the list of RAM blocks.
    Setup,
    /// After the hundredth page.
    MidRound,
    /// After the head of the last section of RAM: the guest was paused.
    Switchover,
    /// After this many bytes of device state.
    State(u64),
}

/// Parses a stream as it passes.
struct Follower {
    parser: IncomingStream,
    unread: Vec<u8>,
    pages: u32,
    state: u64,
    place: Place,
}

impl Follower {
    fn new(place: Place) -> Self {
        let parser = IncomingStream::new(IncomingConfig::default());
        Self { parser, unread: Vec::new(), pages: 0, state: 0, place }
    }

    /// How many of `bytes` come after the position; `None` while it is not reached.
    fn behind(&mut self, bytes: &[u8]) -> Option<usize> {
        self.unread.extend_from_slice(bytes);
        let mut at = 0;
        loop {
            match self.parser.next(&self.unread[at..]).unwrap() {
                Step::Event { consumed, event } => {
                    at += consumed;
                    self.pages += u32::from(matches!(event, Event::Page { .. }));
                    self.state += if let Event::TailBytes(bytes) = event { bytes.len() as u64 } else { 0 };
                    let part = match event {
                        Event::SectionStart { kind: SectionKind::Ram, phase, .. } => Some(phase),
                        _ => None,
                    };
                    let (reached, too_far) = match self.place {
                        Place::Setup => (matches!(event, Event::Blocks(_)), 0),
                        Place::MidRound => (self.pages == 100, 0),
                        Place::Switchover => (part == Some(Phase::End), 0),
                        Place::State(due) => (self.state >= due, self.state.saturating_sub(due)),
                    };
                    if reached {
                        return Some(self.unread.len() - at + too_far as usize);
                    }
                }
                Step::NeedMore { consumed, .. } => {
                    self.unread.drain(..at + consumed);
                    return None;
                }
            }
        }
    }
}

/// A proxy between source and destination that forwards bytes, and acts once.
pub(crate) struct Proxy {
    pub(crate) uri: String,
    thread: JoinHandle<()>,
}

impl Proxy {
    pub(crate) fn start(to: &str, when: When, act: impl FnOnce() + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let to = to.strip_prefix("tcp:").unwrap().to_owned();
        let thread = std::thread::spawn(move || {
            let (source, _) = listener.accept().unwrap();
            let destination = TcpStream::connect(&to).unwrap();
            let (mut from_far, mut to_near) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
            let muted = when == When::Silence;
            let back = std::thread::spawn(move || {
                // The answers to the greeting and to the first measurement of the round trip always pass: four PONGs.
                let passed = (0..if muted { 4 } else { 0 }).try_for_each(|_| {
                    let mut pong = [0; 8];
                    from_far.read_exact(&mut pong).and_then(|()| to_near.write_all(&pong))
                });
                let sink = &mut std::io::sink() as &mut dyn Write;
                let _ = passed
                    .and_then(|()| std::io::copy(&mut from_far, if muted { sink } else { &mut to_near }));
                if !muted {
                    let _ = to_near.shutdown(Shutdown::Write);
                }
            });
            pass(&source, &destination, when);
            act();
            let _ = source.shutdown(Shutdown::Both);
            let _ = destination.shutdown(Shutdown::Both);
            back.join().unwrap();
        });
        Self { uri, thread }
    }

    pub(crate) fn end(self) {
        self.thread.join().unwrap();
    }
}

fn pass(mut source: &TcpStream, mut destination: &TcpStream, when: When) {
    let mut left = match when {
        When::Bytes(count) => count,
        When::Silence | When::Flip(_) | When::Reaches(_) => u64::MAX,
    };
    let mut passed = 0;
    let mut follower = match when {
        When::Reaches(place) => Some(Follower::new(place)),
        _ => None,
    };
    // Only a source that waits in vain for an answer is silent; others end.
    let silence = (when == When::Silence).then_some(Duration::from_secs(2));
    source.set_read_timeout(silence).unwrap();
    let mut buffer = vec![0; 1 << 16];
    while left > 0 {
        let room = buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let Ok(got @ 1..) = source.read(&mut buffer[..room]) else { return };
        if let When::Flip(at) = when
            && (passed..passed + got as u64).contains(&at)
        {
            buffer[(at - passed) as usize] ^= 1;
        }
        passed += got as u64;
        if let Some(behind) = follower.as_mut().and_then(|follower| follower.behind(&buffer[..got])) {
            let _ = destination.write_all(&buffer[..got - behind]);
            return;
        }
        if destination.write_all(&buffer[..got]).is_err() {
            return;
        }
        left -= got as u64;
    }
}
