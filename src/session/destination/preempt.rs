//! The source's connection for urgent pages (QEMU: postcopy-preempt), so that a page that a thread waits for is not queued
//! after others.
//!
//! A source opens it between its first bytes and the package, and writes nothing on it before the first request.
//! Nothing in the stream announces it. So from the package on a thread waits for it, and stops when the migration has
//! ended. The connection carries records of pages without a section around them, with a current block of its own; a
//! QEMU up to 7.2 writes a mark after the last one.
//!
//! A source that reconnects after a loss may do so before this end has noticed the loss. The first byte shows it: a
//! command, with which no record of a page begins.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::Chain;
use crate::guest::{PageWriter, Placer};
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::ram::{Record, decode_record};
use crate::stream::{DecodeError, Fault};
use crate::sys::{Lock as _, RecvPart, Stop};
use crate::transport::{ByteSource, ChannelError, StreamChannel};

use super::arrivals::{Connections, SharedNext, Use};
use crate::session::Error;
use crate::session::callback::guarded;
use crate::session::workers::Spawner;

/// Bytes read at a time.
const BUFFER: usize = 64 << 10;
/// How long the source may take to close the connection after it knows that the guest runs.
const PART_WITHIN: Duration = Duration::from_secs(2);
/// Interval between two checks whether it has closed.
const PART_CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// State shared by the thread and the session.
#[derive(Default)]
struct State {
    pages: AtomicU64,
    bytes: AtomicU64,
    /// The connection is there.
    connected: AtomicBool,
    /// The main connection has received its last page.
    main_ended: AtomicBool,
    /// A main connection that replaces a lost one and was accepted here.
    early: Mutex<Option<StreamChannel>>,
}

/// Ends all use of the present connections; with the error that is the cause.
pub(super) type LoseFn = dyn Fn(Option<Error>) + Send + Sync;

/// Where urgent pages go, and what ends with their connection.
#[derive(Clone)]
pub(super) struct UrgentPages {
    pub(super) placer: Arc<Placer>,
    /// Ends each wait.
    pub(super) stop: Stop,
    pub(super) lose: Arc<LoseFn>,
}

/// The thread that waits for the connection and reads it.
pub(super) struct Preempt {
    blocks: AnnouncedBlocks,
    next: SharedNext,
    spawner: Spawner,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Preempt {
    pub(super) fn new(mut blocks: AnnouncedBlocks, next: SharedNext, spawner: Spawner) -> Self {
        blocks.forget_current();
        Self { blocks, next, spawner, state: Arc::default(), thread: None }
    }

    /// Waits for the connection from here on, if connections can be accepted.
    pub(super) fn start(&mut self, pages: UrgentPages) -> Result<(), Error> {
        let Some(next) = self.next.take() else { return Ok(()) };
        self.state.main_ended.store(false, Ordering::Release);
        let (slot, stop) = (self.next.clone(), pages.stop.clone());
        let urgent = Urgent {
            pages,
            state: Arc::clone(&self.state),
            blocks: self.blocks.clone(),
            writer: PageWriter::default(),
        };
        let job = move || {
            let (mut urgent, mut next) = (urgent, next);
            let done = guarded("receiving urgent pages", || urgent.run(&mut next, &stop));
            slot.put(Some(next));
            urgent.state.connected.store(false, Ordering::Release);
            match done.and_then(|done| done) {
                Ok(()) => {}
                Err(_) if stop.reason().is_some() => {}
                Err(error) => {
                    tracing::warn!(error = %Chain(&error), "the connection for urgent pages");
                    (urgent.pages.lose)(Some(error));
                }
            }
        };
        self.thread = Some(self.spawner.spawn("ramwire-preempt", Box::new(job))?);
        Ok(())
    }

    /// True while urgent pages may arrive.
    pub(super) fn is_expected(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Pages that threads wait for arrive here, and not on the main connection.
    pub(super) fn is_connected(&self) -> bool {
        self.state.connected.load(Ordering::Acquire)
    }

    /// The main connection has received its last page: the source may close this one.
    pub(super) fn main_ended(&self) {
        self.state.main_ended.store(true, Ordering::Release);
    }

    /// Waits for the end of the thread, which the loss of the connection ends. Returns the source's next main
    /// connection, if it was accepted here.
    pub(super) fn end(&mut self) -> Option<StreamChannel> {
        if let Some(thread) = self.thread.take() {
            // A panic was treated as an error before.
            let _ = thread.join();
        }
        self.state.early.locked().take()
    }

    /// The migration has ended: lets the source close the connection, on which it may still write its last mark, and
    /// ends the thread. Returns the numbers of target pages and bytes received.
    pub(super) fn finish(&mut self, pages: &UrgentPages) -> (u64, u64) {
        let stop = pages.stop.within(PART_WITHIN);
        while self.state.connected.load(Ordering::Acquire) {
            if stop.sleep(PART_CHECK_INTERVAL).is_some() {
                break;
            }
        }
        (pages.lose)(None);
        self.end();
        (self.state.pages.load(Ordering::Relaxed), self.state.bytes.load(Ordering::Relaxed))
    }
}

/// The thread's own.
struct Urgent {
    pages: UrgentPages,
    state: Arc<State>,
    blocks: AnnouncedBlocks,
    writer: PageWriter,
}

impl Urgent {
    fn run(&mut self, next: &mut Connections, stop: &Stop) -> Result<(), Error> {
        loop {
            let connected = |waits| self.state.connected.store(waits, Ordering::Release);
            let mut channel = match next.first_with_data(stop, connected) {
                Ok((channel, Use::Urgent)) => channel,
                Ok((channel, Use::Main)) => {
                    *self.state.early.locked() = Some(channel);
                    (self.pages.lose)(None);
                    return Ok(());
                }
                Err(error) => {
                    tracing::debug!(%error, "no connection for urgent pages");
                    return Ok(());
                }
            };
            // It is silent while no thread waits for a page.
            channel.set_stall(None);
            connected(true);
            let before = self.state.pages.load(Ordering::Relaxed);
            let read = self.read(&mut channel, stop);
            if self.state.main_ended.load(Ordering::Acquire) && read.is_ok() || stop.reason().is_some() {
                return Ok(());
            }
            // A connection without any page is not the source's, or the source has closed it.
            if self.state.pages.load(Ordering::Relaxed) > before {
                let doing = "waiting for urgent pages";
                let closed = || ChannelError::Closed { peer: channel.peer().into(), doing }.into();
                return Err(read.err().unwrap_or_else(closed));
            }
            let why = read.err().map_or_else(|| "it was closed".into(), |error| Chain(&error).to_string());
            tracing::warn!(peer = channel.peer(), why, "a connection that is of no use");
        }
    }

    /// Places the received pages, to the end of the connection.
    fn read(&mut self, channel: &mut StreamChannel, stop: &Stop) -> Result<(), Error> {
        let (mut buffer, mut start, mut end) = (vec![0; BUFFER], 0, 0);
        self.blocks.forget_current();
        self.writer.forget_parts();
        loop {
            match self.record(buffer.get(start..end).unwrap_or(&[])) {
                Ok(used) => start += used,
                Err(Error::Decode(DecodeError::Truncated { .. })) => {
                    buffer.copy_within(start..end, 0);
                    (start, end) = (0, end - start);
                    let got = channel.recv(&mut [RecvPart::Own(&mut buffer[end..])], stop)?;
                    if got == 0 {
                        return Ok(());
                    }
                    end += got;
                    // A QEMU leaves Nagle's algorithm enabled here. The kernel resets this setting with the next bytes.
                    channel.acknowledge_at_once();
                    self.state.bytes.fetch_add(got as u64, Ordering::Relaxed);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Places the page of the record at the front of `input`; returns the number of bytes it took.
    fn record(&mut self, input: &[u8]) -> Result<usize, Error> {
        let placer = &self.pages.placer;
        let page = placer.memory().table().page();
        let (record, head) = decode_record(input, page)?;
        let at_front = |fault| Error::Decode(DecodeError::corrupt(0, fault));
        match record {
            Record::Page(at) => {
                let used = head + page.bytes() as usize;
                let Some(bytes) = input.get(head..used) else {
                    let truncated = DecodeError::Truncated { needed: used, have: input.len() };
                    return Err(Error::Decode(truncated));
                };
                let (block, offset) = self.blocks.locate(at, page).map_err(at_front)?;
                let landing = placer.admit(block, offset, page.bytes())?;
                self.writer.place(placer, landing, std::iter::once(bytes))?;
                self.state.pages.fetch_add(1, Ordering::Relaxed);
                Ok(used)
            }
            Record::Zero { at, fill: 0 } => {
                let (block, offset) = self.blocks.locate(at, page).map_err(at_front)?;
                let landing = placer.admit(block, offset, page.bytes())?;
                self.writer.place_zero(placer, landing)?;
                self.state.pages.fetch_add(1, Ordering::Relaxed);
                Ok(head)
            }
            Record::Zero { fill: byte, .. } => Err(at_front(Fault::FillByte { byte })),
            Record::Eos => Ok(head),
            _ => Err(at_front(Fault::RecordFlags { flags: 0 })),
        }
    }
}
