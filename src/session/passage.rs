//! A paused postcopy goes on through here: what both ends say to each other is passed on unchanged.
//!
//! ```text
//! source                     here                     far end
//! RECV_BITMAP*          ->   unchanged           ->
//!                       <-   unchanged           <-   bitmaps
//! RESUME, pages, end    ->   unchanged           ->
//!                       <-   unchanged           <-   RESUME_ACK, requests, at last that all has come
//! ```
//!
//! Nothing is kept and nothing decided here: if it ends, both ends pause again, as over a connection of their own. The
//! source's further connections, for urgent pages, are passed on too, each over one of its own.
//!
//! # Required order
//!
//! The far end has what the source's first connection begins with before the next connection is made: it tells them apart
//! by that, or by their order.

use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::error::{Chain, Remedy};
use crate::session::destination::arrivals::{Begins, Connections, first_bytes};
use crate::session::{Error, NextConnection, Spawner};
use crate::stream::native::Answer;
use crate::stream::qemu::command::{Command, HEAD_LEN};
use crate::stream::qemu::return_path::Message;
use crate::sys::{CancelToken, Lock as _, RecvPart, SendPart, Stop};
use crate::transport::{ByteSink as _, ByteSource as _, OpenError, StreamBreaker, StreamChannel};

/// Bytes passed on at a time.
const BUFFER: usize = 256 << 10;
/// The last bytes of a direction that are kept: as many as the longest last word has.
const LAST_WORD: usize = 32;

/// Connects to the far end, each time that the source has connected.
pub type ConnectAgainFn = dyn FnMut(&Stop) -> Result<StreamChannel, OpenError> + Send;

/// Passes a source's connections on to a far end, between which a postcopy was paused.
pub struct Passage {
    /// The source's connections, and whatever else connects.
    pub from_source: Box<dyn NextConnection>,
    /// The far end's.
    pub to_far_end: Box<ConnectAgainFn>,
    /// Ends it; raised at its end as well.
    pub cancel: CancelToken,
    /// How threads are started: two for each connection.
    pub spawner: Spawner,
}

/// How a [`Passage`] ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct PassageReport {
    /// The far end has reported to the source that all memory has come.
    pub completed: bool,
    /// The source has connected, and the far end was reached: before that nothing was passed on.
    pub began: bool,
    /// Bytes from the source.
    pub forwarded: u64,
    /// Connections beside the first.
    pub further: u64,
    /// What ended it, unless it was completed or cancelled.
    pub error: Option<Error>,
}

impl Passage {
    /// Waits for the source, and passes bytes on until the first connection has ended on both sides.
    pub fn run(self) -> PassageReport {
        let Self { from_source, mut to_far_end, cancel, spawner } = self;
        let mut connections = Connections::new(from_source);
        let mut report =
            PassageReport { completed: false, began: false, forwarded: 0, further: 0, error: None };
        let mut running = Vec::new();
        let passed = (|| {
            let stop = Stop::on(&cancel);
            let (near, ()) = connections.first_that(&stop, |_| {}, goes_on).map_err(not_accepted)?;
            let far = to_far_end(&stop).map_err(not_reached)?;
            report.began = true;
            let main = Pair::begin(near, far, &cancel, true)?;
            let came = Arc::clone(&main.came);
            running.extend(main.spawn(&spawner)?);
            // Ended by the first connection's end.
            while let Ok(near) = connections.any(&stop) {
                let far = to_far_end(&stop).map_err(not_reached)?;
                report.further += 1;
                running.extend(Pair::begin(near, far, &cancel, false)?.spawn(&spawner)?);
            }
            Ok(came)
        })();
        let called_off = cancel.is_cancelled();
        // Whatever ended it ends all.
        cancel.cancel();
        for thread in running {
            // A panic ends its connection.
            let _ = thread.join();
        }
        match passed {
            Ok(came) => {
                let came = came.locked();
                report.forwarded = came.forwarded;
                report.completed = is_last_word(&came.last_said);
                report.error = came
                    .error
                    .as_ref()
                    .filter(|_| !report.completed)
                    .map(|why| Error::PeerFailed { why: why.clone() });
            }
            Err(_) if called_off => report.error = Some(Error::Cancelled),
            Err(error) => report.error = Some(error),
        }
        report
    }
}

fn not_accepted(source: OpenError) -> Error {
    Error::Config {
        what: format!("the source has not connected: {}", Chain(&source)),
        remedy: Remedy::Advice("let it connect here: `migrate` with `resume`"),
    }
}

fn not_reached(source: OpenError) -> Error {
    Error::Config {
        what: format!("the far end can't be reached: {}", Chain(&source)),
        remedy: Remedy::Advice("let it listen there first: `migrate-recover`"),
    }
}

/// Whether a connection begins as a source's that goes on after a pause.
fn goes_on(channel: &StreamChannel) -> Begins<()> {
    let mut word = Vec::new();
    Command::RecvBitmap { block: "" }.encode(&mut word);
    // Up to the length.
    let (mut bytes, wanted) = ([0; HEAD_LEN], &word[..HEAD_LEN - 2]);
    match first_bytes(channel, &mut bytes) {
        Begins::As(come) if come.starts_with(wanted) => Begins::As(()),
        Begins::As(come) if wanted.starts_with(come) => Begins::InPart,
        Begins::NotYet => Begins::NotYet,
        _ => Begins::Otherwise,
    }
}

/// Whether the far end's last bytes are the report that all has come.
fn is_last_word(bytes: &[u8]) -> bool {
    [Message::Shut { status: 0 }, Message::Native(Answer::Running)].into_iter().any(|word| {
        let mut encoded = Vec::new();
        word.encode(&mut encoded);
        bytes.ends_with(&encoded)
    })
}

/// What has gone over a connection.
#[derive(Default)]
struct Came {
    forwarded: u64,
    last_said: Vec<u8>,
    error: Option<String>,
    /// Directions that have ended.
    ended: u32,
}

/// A connection of the source, and its continuation to the far end.
struct Pair {
    near: StreamChannel,
    far: StreamChannel,
    came: Arc<Mutex<Came>>,
    cancel: CancelToken,
    /// Its end is the end of all.
    is_first: bool,
}

impl Pair {
    /// The first bytes of the first connection are passed on when this returns.
    fn begin(
        mut near: StreamChannel,
        mut far: StreamChannel,
        cancel: &CancelToken,
        is_first: bool,
    ) -> Result<Self, Error> {
        // Either may be silent as long as it likes.
        near.set_stall(None);
        far.set_stall(None);
        let came = Arc::<Mutex<Came>>::default();
        if is_first {
            let stop = Stop::on(cancel);
            let mut first = [0; HEAD_LEN];
            let got = near.recv(&mut [RecvPart::Own(&mut first)], &stop)?;
            far.send(&[SendPart::Own(&first[..got])], &stop)?;
            far.flush(&stop)?;
            came.locked().forwarded = got as u64;
        }
        Ok(Self { near, far, came, cancel: cancel.clone(), is_first })
    }

    /// A thread for each direction.
    fn spawn(self, spawner: &Spawner) -> Result<[JoinHandle<()>; 2], Error> {
        let Self { near, far, came, cancel, is_first } = self;
        let breakers = [near.breaker(), far.breaker()];
        let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
        let direction = |from, to, forward| {
            let (came, cancel, breakers) = (Arc::clone(&came), cancel.clone(), breakers.clone());
            let job = move || {
                let ended = pass(from, to, &Stop::on(&cancel), |bytes| came.locked().note(bytes, forward));
                let mut came = came.locked();
                came.ended += 1;
                let broken = ended.is_err();
                if broken {
                    // The other direction ends too, and each end sees it.
                    breakers.iter().for_each(StreamBreaker::close);
                }
                if let Err(error) = ended
                    && !cancel.is_cancelled()
                {
                    came.error.get_or_insert(Chain(&error).to_string());
                }
                if is_first && (broken || came.ended == 2) {
                    cancel.cancel();
                }
            };
            spawner.spawn("ramwire-passage", Box::new(job))
        };
        Ok([direction(near_in, far_out, true)?, direction(far_in, near_out, false)?])
    }
}

impl Came {
    fn note(&mut self, bytes: &[u8], forward: bool) {
        if forward {
            self.forwarded += bytes.len() as u64;
            return;
        }
        self.last_said.extend_from_slice(&bytes[bytes.len().saturating_sub(LAST_WORD)..]);
        let older = self.last_said.len().saturating_sub(LAST_WORD);
        self.last_said.drain(..older);
    }
}

/// Passes bytes on, and the end of the stream.
fn pass(
    mut from: StreamChannel,
    mut to: StreamChannel,
    stop: &Stop,
    mut note: impl FnMut(&[u8]),
) -> Result<(), Error> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let got = from.recv(&mut [RecvPart::Own(&mut buffer)], stop)?;
        let bytes = buffer.get(..got).unwrap_or_default();
        if bytes.is_empty() {
            return Ok(to.finish(stop)?);
        }
        to.send(&[SendPart::Own(bytes)], stop)?;
        to.flush(stop)?;
        // Behind the send: what was said here has left.
        note(bytes);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread::JoinHandle;
    use std::time::Duration;

    use super::*;
    use crate::transport::StreamOptions;

    const WAIT: Duration = Duration::from_secs(60);

    fn channel(socket: UnixStream) -> StreamChannel {
        StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default()).unwrap()
    }

    /// A passage for as many connections; returns their ends at the source and at the far end.
    fn begin(
        connections: usize,
        cancel: &CancelToken,
    ) -> (Vec<(UnixStream, UnixStream)>, JoinHandle<PassageReport>) {
        let (mut ends, mut near, mut far) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..connections {
            let [(source, ours), (theirs, end)] = [(); 2].map(|()| UnixStream::pair().unwrap());
            [&source, &end].iter().for_each(|end| end.set_read_timeout(Some(WAIT)).unwrap());
            near.push(ours);
            far.push(theirs);
            ends.push((source, end));
        }
        let (mut near, mut far) = (near.into_iter(), far.into_iter());
        let no_other = || OpenError::OnlyOne { address: "all".into() };
        let passage = Passage {
            from_source: Box::new(move |stop: &Stop| match near.next() {
                Some(socket) => Ok(channel(socket)),
                None => {
                    stop.sleep(WAIT);
                    Err(no_other())
                }
            }),
            to_far_end: Box::new(move |_: &Stop| far.next().map(channel).ok_or_else(no_other)),
            cancel: cancel.clone(),
            spawner: Spawner::default(),
        };
        (ends, std::thread::spawn(move || passage.run()))
    }

    fn asks() -> Vec<u8> {
        let mut out = Vec::new();
        Command::RecvBitmap { block: "ram" }.encode(&mut out);
        out
    }

    fn passes(mut from: &UnixStream, mut to: &UnixStream, bytes: &[u8]) {
        from.write_all(bytes).unwrap();
        let mut read = vec![0; bytes.len()];
        to.read_exact(&mut read).unwrap();
        assert_eq!(read, bytes);
    }

    fn encoded(word: Message<'_>) -> Vec<u8> {
        let mut out = Vec::new();
        word.encode(&mut out);
        out
    }

    #[test]
    fn all_bytes_are_passed_on_in_both_directions_and_the_last_word_is_known() {
        for (word, completed) in [
            (Message::Shut { status: 0 }, true),
            (Message::Native(Answer::Running), true),
            (Message::Shut { status: 1 }, false),
            (Message::Pong(7), false),
        ] {
            let (ends, passage) = begin(2, &CancelToken::default());
            let [(source, far), (urgent, far_urgent)] = &ends[..] else { unreachable!() };
            passes(source, far, &asks());
            passes(far, source, &[5; 100]);
            passes(urgent, far_urgent, &[6; 5000]);
            passes(source, far, &[7; 5000]);
            passes(far, source, &encoded(word));
            drop(ends);
            let report = passage.join().unwrap();
            assert_eq!((report.completed, report.began, report.further), (completed, true, 1), "{report:?}");
            assert_eq!(report.forwarded, asks().len() as u64 + 5000);
        }
    }

    /// Either end sees the loss of either connection of the other.
    #[test]
    fn a_connection_that_ends_ends_for_both() {
        for first in [true, false] {
            let (mut ends, passage) = begin(2, &CancelToken::default());
            passes(&ends[0].0, &ends[0].1, &asks());
            passes(&ends[1].0, &ends[1].1, b"page");
            let (source, mut far) = ends.remove(usize::from(!first));
            drop(source);
            far.read_to_end(&mut Vec::new()).unwrap();
            drop((far, ends));
            let report = passage.join().unwrap();
            assert!(!report.completed && report.began, "{report:?}");
        }
    }

    #[test]
    fn what_does_not_go_on_after_a_pause_is_no_source_and_a_cancel_ends_the_wait() {
        let cancel = CancelToken::default();
        let (ends, passage) = begin(2, &cancel);
        let [(mut stranger, _), (source, far)] = <[_; 2]>::try_from(ends).unwrap();
        stranger.write_all(b"QEVM").unwrap();
        // Ended, or reset with bytes that nobody has read.
        let _ = stranger.read_to_end(&mut Vec::new());
        drop((source, far));
        cancel.cancel();
        let report = passage.join().unwrap();
        assert!(!report.began && matches!(report.error, Some(Error::Cancelled)), "{report:?}");
    }
}
