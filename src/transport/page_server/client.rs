//! The client's side: memory on another host, read by any number of threads over one connection.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, Sender, bounded};

use super::{fill, not_understood};
use crate::error::Chain;
use crate::stream::page_requests::{
    ANSWER_LEN, Answer, Asked, MAP_PAGE, MAX_MAP, MAX_READ, Request, WELCOME_LEN, Welcome, encode_hello,
};
use crate::sys::{CancelToken, Lock as _, SendPart, SpawnFn, Stop, StopReason};
use crate::transport::{
    Address, ByteSink as _, ChannelError, OpenError, StreamBreaker, StreamChannel, StreamOptions, connect,
};

/// A server answers within this time, or its connection counts as lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time for a connection and its greeting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Shortest time between two tries to connect again.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// Bytes of one request of a long read.
const PART: u64 = 256 << 10;
/// Requests of one long read that are in flight.
const UNDER_WAY: usize = 8;

const READING: &str = "reading pages from a page server";

/// Memory that a [`PageServer`](super::PageServer) serves. A connection that is lost is made anew by the next read; a server
/// with another memory is refused then.
pub struct RemoteMemory {
    address: Address,
    welcome: Welcome,
    spawn: Arc<SpawnFn>,
    link: Mutex<Dialed>,
}

struct Dialed {
    link: Option<Arc<Link>>,
    tried: Instant,
}

/// The requested bytes, or why there are none.
type Answered = Result<Vec<u8>, String>;

/// A part of a read, and its answer.
type Part = (Range<usize>, Receiver<Answered>);

/// A connection.
struct Link {
    sink: Mutex<StreamChannel>,
    waiting: Mutex<Waiting>,
    breaker: StreamBreaker,
    is_lost: AtomicBool,
    cancel: CancelToken,
}

#[derive(Default)]
struct Waiting {
    next: u32,
    /// By number: bytes of the answer, and its receiver.
    asked: BTreeMap<u32, (u64, Sender<Answered>)>,
}

impl fmt::Debug for RemoteMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteMemory").field("address", &self.address.to_string()).finish_non_exhaustive()
    }
}

impl RemoteMemory {
    /// Connects to the server at `address`; `spawn` starts a thread for each connection.
    ///
    /// # Errors
    /// [`OpenError`]: nothing answers there, or no page server does.
    pub fn connect(address: &Address, spawn: Arc<SpawnFn>) -> Result<Self, OpenError> {
        let (link, welcome) = dial(address, &spawn)?;
        let link = Mutex::new(Dialed { link: Some(link), tried: Instant::now() });
        Ok(Self { address: address.clone(), welcome, spawn, link })
    }

    /// Its bytes.
    pub(in crate::transport) fn len(&self) -> u64 {
        self.welcome.len
    }

    /// Which memory it is.
    pub(in crate::transport) fn identity(&self) -> [u8; 16] {
        self.welcome.id
    }

    pub(in crate::transport) fn name(&self) -> String {
        self.address.to_string()
    }

    /// Fills `into` from `offset` on; of a long read several requests are in flight.
    pub(in crate::transport) fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let link = self.link()?;
        let mut parts: VecDeque<Part> = VecDeque::new();
        let mut asked = 0;
        loop {
            while asked < into.len() && parts.len() < UNDER_WAY {
                let len = (into.len() - asked).min(PART.min(MAX_READ) as usize);
                let answer = link.ask(Asked::Read, offset + asked as u64, len as u64)?;
                parts.push_back((asked..asked + len, answer));
                asked += len;
            }
            let Some((part, answer)) = parts.pop_front() else { return Ok(()) };
            let bytes = link.answer(&answer)?;
            into[part].copy_from_slice(&bytes);
        }
    }

    /// Calls `run` with each run of bytes that holds something.
    pub(in crate::transport) fn present(
        &self,
        offset: u64,
        end: u64,
        mut run: impl FnMut(u64, u64),
    ) -> io::Result<()> {
        let mut at = offset;
        while at < end {
            let len = (end - at).min(MAX_MAP);
            let link = self.link()?;
            let map = link.answer(&link.ask(Asked::Map, at, len)?)?;
            for (byte, bits) in (0..).zip(map) {
                for bit in (0..8).filter(|bit| bits >> bit & 1 == 1) {
                    let start = at + (byte * 8 + bit) * MAP_PAGE;
                    run(start, (start + MAP_PAGE).min(end));
                }
            }
            at += len;
        }
        Ok(())
    }

    /// The connection, made anew if it was lost.
    fn link(&self) -> io::Result<Arc<Link>> {
        let mut dialed = self.link.locked();
        if let Some(link) = dialed.link.as_ref().filter(|link| !link.is_lost.load(Ordering::Acquire)) {
            return Ok(Arc::clone(link));
        }
        if dialed.tried.elapsed() < RETRY_INTERVAL && dialed.link.is_none() {
            return Err(io::Error::other(format!("{} is not connected", self.address)));
        }
        (dialed.link, dialed.tried) = (None, Instant::now());
        let (link, welcome) =
            dial(&self.address, &self.spawn).map_err(|error| io::Error::other(Chain(&error).to_string()))?;
        if welcome != self.welcome {
            let why = "serves other memory than before; serve the memory that this guest was started from";
            return Err(io::Error::other(format!("{} {why}", self.address)));
        }
        Ok(Arc::clone(dialed.link.insert(link)))
    }
}

impl Drop for RemoteMemory {
    fn drop(&mut self) {
        if let Some(link) = self.link.locked().link.take() {
            link.sink.locked().say_end_at_once();
            link.lose("reading of the memory has stopped");
        }
    }
}

fn dial(address: &Address, spawn: &Arc<SpawnFn>) -> Result<(Arc<Link>, Welcome), OpenError> {
    let cancel = CancelToken::default();
    let stop = Stop::on(&cancel).within(CONNECT_TIMEOUT);
    let mut channel = connect(address, &StreamOptions::default(), &stop)?;
    let mut hello = Vec::new();
    encode_hello(&mut hello);
    channel.send(&[SendPart::Own(&hello)], &stop)?;
    channel.flush(&stop)?;
    let mut welcome = [0; WELCOME_LEN];
    if !fill(&mut channel, &mut welcome, READING, &stop)? {
        return Err(ChannelError::Closed { peer: channel.peer().to_owned(), doing: READING }.into());
    }
    let welcome = Welcome::decode(&welcome).map_err(|error| not_understood(&channel, READING, error))?;
    let breaker = channel.breaker();
    let (sink, mut source) = channel.split();
    // There may be no page to request; a dead host is noticed by TCP.
    source.set_stall(None);
    let link = Arc::new(Link {
        sink: Mutex::new(sink),
        waiting: Mutex::default(),
        breaker,
        is_lost: AtomicBool::new(false),
        cancel,
    });
    let reading = Arc::clone(&link);
    let started = spawn("ramwire-page-rx", Box::new(move || reading.take_answers(source)));
    started.map_err(|source| ChannelError::Io {
        peer: address.to_string(),
        doing: "starting a thread",
        source,
    })?;
    Ok((link, welcome))
}

impl Link {
    fn ask(&self, asked: Asked, offset: u64, len: u64) -> io::Result<Receiver<Answered>> {
        let (give, answer) = bounded(1);
        let request = {
            let mut waiting = self.waiting.locked();
            if self.is_lost.load(Ordering::Acquire) {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            waiting.next = waiting.next.wrapping_add(1);
            let request = Request { number: waiting.next, asked, offset, len };
            waiting.asked.insert(request.number, (request.answer_len(), give));
            request
        };
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        let stop = Stop::on(&self.cancel);
        let mut sink = self.sink.locked();
        let sent = sink.send(&[SendPart::Own(&bytes)], &stop).and_then(|()| sink.flush(&stop));
        drop(sink);
        if let Err(error) = sent {
            let why = Chain(&error).to_string();
            self.lose(&why);
            return Err(io::Error::other(why));
        }
        Ok(answer)
    }

    fn answer(&self, answer: &Receiver<Answered>) -> io::Result<Vec<u8>> {
        match answer.recv_timeout(ANSWER_TIMEOUT) {
            Ok(answer) => answer.map_err(io::Error::other),
            Err(_) => {
                let why = format!("the page server has not answered for {} s", ANSWER_TIMEOUT.as_secs());
                self.lose(&why);
                Err(io::Error::other(why))
            }
        }
    }

    /// Its answers are no longer waited for.
    fn lose(&self, why: &str) {
        let mut waiting = self.waiting.locked();
        self.is_lost.store(true, Ordering::Release);
        for (_, (_, give)) in std::mem::take(&mut waiting.asked) {
            // The requester may no longer wait for it.
            let _ = give.send(Err(why.to_owned()));
        }
        drop(waiting);
        self.cancel.cancel();
        self.breaker.close();
    }

    fn take_answers(&self, mut source: StreamChannel) {
        let stop = Stop::on(&self.cancel);
        let ended = loop {
            match self.take_answer(&mut source, &stop) {
                Ok(true) => {}
                Ok(false) => break "the page server has closed the connection".to_owned(),
                Err(ChannelError::Stopped { reason: StopReason::Cancelled, .. }) => return,
                Err(error) => break Chain(&error).to_string(),
            }
        };
        self.lose(&ended);
    }

    fn take_answer(&self, source: &mut StreamChannel, stop: &Stop) -> Result<bool, ChannelError> {
        let mut head = [0; ANSWER_LEN];
        if !fill(source, &mut head, READING, stop)? {
            return Ok(false);
        }
        let answer = Answer::decode(&head).map_err(|error| not_understood(source, READING, error))?;
        let Some((asked, give)) = self.waiting.locked().asked.remove(&answer.number) else {
            let why =
                io::Error::other(format!("it answered request {}, which was never made", answer.number));
            return Err(not_understood(source, READING, why));
        };
        // Before there is room for it.
        let checked = answer.check(asked).map_err(|error| not_understood(source, READING, error));
        let mut bytes = Vec::new();
        let filled = checked.and_then(|()| {
            bytes.resize(usize::try_from(answer.len).unwrap_or(0), 0);
            fill(source, &mut bytes, READING, stop)
        });
        let answered = match &filled {
            Ok(true) if answer.is_done => Ok(bytes),
            Ok(true) => Err(String::from_utf8_lossy(&bytes).into_owned()),
            Ok(false) => Err("the page server has closed the connection".to_owned()),
            Err(error) => Err(Chain(error).to_string()),
        };
        let _ = give.send(answered);
        filled
    }
}
