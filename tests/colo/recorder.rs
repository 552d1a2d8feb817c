//! A proxy between a primary and its standby that follows the stream, and cuts it at a place.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use ramwire::stream::qemu::colo::{ColoEvent, ColoMessage, ColoStep, ColoStream};
use ramwire::stream::qemu::incoming::{Event, IncomingConfig};

const PAGE: usize = 4096;

/// Where the primary is killed. Nothing that it has sent behind that reaches the standby. Checkpoint 1 is the first
/// migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// In the first migration, after so many pages.
    First(u64),
    /// After the request for this checkpoint.
    Request(u64),
    /// In this checkpoint, after so many pages, or after the last of its RAM if there are fewer.
    Page(u64, u64),
    /// In the device state of this checkpoint, after so many bytes.
    State(u64, u64),
    /// After the last byte of this checkpoint.
    Whole(u64),
}

/// What a standby must have: the RAM of the last whole checkpoint, by a decoder that shares no code with the standby's
/// cache.
#[derive(Default)]
pub(crate) struct Known {
    /// Names and RAM of the blocks.
    pub(crate) blocks: Vec<(String, Vec<u8>)>,
    /// The last whole checkpoint.
    pub(crate) whole: u64,
    /// Device state of that one.
    pub(crate) state: Vec<u8>,
    /// Pages of all checkpoints behind the first.
    pub(crate) pages: u64,
    /// Checkpoints that the standby has said to have applied.
    pub(crate) loaded: u64,
}

struct Follower {
    stream: ColoStream,
    unread: Vec<u8>,
    cut: Cut,
    /// The checkpoint that arrives.
    number: u64,
    arriving: BTreeMap<(usize, u64), Option<Vec<u8>>>,
    /// Pages and bytes of device state of it.
    pages: u64,
    state: Vec<u8>,
    known: Arc<Mutex<Known>>,
}

impl Follower {
    fn new(cut: Cut, known: Arc<Mutex<Known>>) -> Self {
        Self {
            stream: ColoStream::new(IncomingConfig::default(), 1 << 26),
            unread: Vec::new(),
            cut,
            number: 1,
            arriving: BTreeMap::new(),
            pages: 0,
            state: Vec::new(),
            known,
        }
    }

    fn place(&mut self, block: usize, offset: u64, bytes: Option<&[u8]>) {
        self.pages += 1;
        self.arriving.insert((block, offset), bytes.map(<[u8]>::to_vec));
    }

    fn is_whole(&mut self) {
        let mut known = self.known.lock().unwrap();
        for ((block, offset), bytes) in std::mem::take(&mut self.arriving) {
            let at = offset as usize;
            let page = &mut known.blocks[block].1[at..at + PAGE];
            match bytes {
                Some(bytes) => page.copy_from_slice(&bytes),
                None => page.fill(0),
            }
        }
        known.whole = self.number;
        known.pages += if self.number > 1 { self.pages } else { 0 };
        known.state = match self.number {
            1 => self.stream.items().tail().bytes().to_vec(),
            _ => std::mem::take(&mut self.state),
        };
    }

    /// How many of `bytes` come behind the cut; `None` while it is not reached.
    fn behind(&mut self, bytes: &[u8]) -> Option<usize> {
        self.unread.extend_from_slice(bytes);
        let unread = std::mem::take(&mut self.unread);
        let mut at = 0;
        loop {
            match self.stream.next(&unread[at..]).unwrap() {
                ColoStep::Event { consumed, event } => {
                    at += consumed;
                    let mut too_far = 0;
                    let is_here = match event {
                        ColoEvent::Item(Event::Blocks(blocks)) => {
                            let empty = |length: u64| vec![0; length as usize];
                            let blocks = blocks.iter().map(|b| (b.name.to_string(), empty(b.used_length)));
                            self.known.lock().unwrap().blocks = blocks.collect();
                            false
                        }
                        ColoEvent::Item(Event::Page { block, offset, bytes }) => {
                            self.place(block.as_usize(), offset.0, Some(bytes));
                            self.is_cut_in_pages()
                        }
                        ColoEvent::Item(Event::Zero { block, offset }) => {
                            self.place(block.as_usize(), offset.0, None);
                            self.is_cut_in_pages()
                        }
                        ColoEvent::Requested => {
                            self.number += 1;
                            self.pages = 0;
                            self.cut == Cut::Request(self.number)
                        }
                        ColoEvent::StateBegins(_) => {
                            self.state.clear();
                            matches!(self.cut, Cut::Page(number, _) if number == self.number)
                        }
                        ColoEvent::State(bytes) => {
                            self.state.extend_from_slice(bytes);
                            match self.cut {
                                Cut::State(number, due) if number == self.number => {
                                    too_far = (self.state.len() as u64).saturating_sub(due);
                                    self.state.len() as u64 >= due
                                }
                                _ => false,
                            }
                        }
                        ColoEvent::Whole => {
                            self.is_whole();
                            self.cut == Cut::Whole(self.number)
                        }
                        ColoEvent::Item(_) => false,
                    };
                    if is_here {
                        return Some(unread.len() - at + too_far as usize);
                    }
                }
                ColoStep::NeedMore { consumed, .. } => {
                    self.unread = unread[at + consumed..].to_vec();
                    return None;
                }
            }
        }
    }

    fn is_cut_in_pages(&self) -> bool {
        match self.cut {
            Cut::First(pages) => self.number == 1 && self.pages >= pages,
            Cut::Page(number, pages) => number == self.number && self.pages >= pages,
            _ => false,
        }
    }
}

pub(crate) struct Recorder {
    pub(crate) uri: String,
    known: Arc<Mutex<Known>>,
    thread: JoinHandle<()>,
}

impl Recorder {
    /// Between a primary and the standby at `to`. At the cut `act` is called; the connection is closed if it returns true,
    /// and otherwise by the standby.
    pub(crate) fn start(to: &str, cut: Cut, act: impl FnOnce() -> bool + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let uri = format!("tcp:{}", listener.local_addr().unwrap());
        let to = to.strip_prefix("tcp:").unwrap().to_owned();
        let known = Arc::<Mutex<Known>>::default();
        let mut follower = Follower::new(cut, Arc::clone(&known));
        let loaded = Arc::clone(&known);
        let thread = std::thread::spawn(move || {
            let (mut primary, _) = listener.accept().unwrap();
            let mut standby = TcpStream::connect(&to).unwrap();
            let (mut from_far, mut to_near) = (standby.try_clone().unwrap(), primary.try_clone().unwrap());
            let back = std::thread::spawn(move || {
                let mut word = [0; 4];
                while from_far.read_exact(&mut word).is_ok() && to_near.write_all(&word).is_ok() {
                    let is_applied =
                        matches!(ColoMessage::decode(&word), Ok(ColoMessage::Ready | ColoMessage::Loaded));
                    loaded.lock().unwrap().loaded += u64::from(is_applied);
                }
                let _ = to_near.shutdown(Shutdown::Both);
            });
            let (mut bytes, mut closes) = (vec![0; 1 << 20], true);
            while let Ok(got @ 1..) = primary.read(&mut bytes) {
                let behind = follower.behind(&bytes[..got]);
                if standby.write_all(&bytes[..got - behind.unwrap_or(0)]).is_err() {
                    break;
                }
                if behind.is_some() {
                    closes = act();
                    break;
                }
            }
            if closes {
                // What was forwarded is still read.
                let _ = standby.shutdown(Shutdown::Write);
            }
            back.join().unwrap();
        });
        Self { uri, known, thread }
    }

    /// Checkpoints that the standby has applied so far.
    pub(crate) fn loaded(&self) -> u64 {
        self.known.lock().unwrap().loaded
    }

    /// Waits for the end of the connection; returns what the standby must have.
    pub(crate) fn end(self) -> Known {
        self.thread.join().unwrap();
        std::mem::take(&mut *self.known.lock().unwrap())
    }
}
