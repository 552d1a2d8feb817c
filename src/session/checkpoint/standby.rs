//! The standby's session: does what the engine decides, on one thread.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};

use super::inbox::Inbox;
use super::{StandbyReport, StandbySettings, refuse_ignored};
use crate::engine::{StandbyAction, StandbyDoubt, StandbyEnding, StandbyEngine, StandbyEvent};
use crate::error::{Chain, Remedy};
use crate::guest::{CheckpointCache, GuestMemory, load_state};
use crate::ram::{BlockName, MAX_BLOCKS, PageRun, RamBlock};
use crate::session::callback::{guarded, named};
use crate::session::destination::same_blocks;
use crate::session::{DestinationGuest, Error, Incoming};
use crate::stream::checkpoints::{CheckpointMessage, HEAD_LEN, StandbyMessage};
use crate::sys::{RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, ChannelError, StreamChannel};
use crate::units::{BlockIndex, PageIndex};

/// Pages that are applied by one call.
const APPLIED_AT_ONCE: u64 = 4096;
/// Bytes of device state that memory is made for at once: more only after they have come.
const STATE_PIECE: u64 = 1 << 20;
/// Longest time in which a source that may be dead is told that its guest was taken.
const TELL_TIMEOUT: Duration = Duration::from_secs(1);
/// Longest time in which a source takes an answer that it waits for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A standby before it has a guest.
pub struct StandbySession {
    guest: DestinationGuest,
    channel: StreamChannel,
    settings: StandbySettings,
    inbox: Arc<Inbox<StandbyEvent>>,
}

impl StandbySession {
    /// Keeps the guest that the source at the other end of `channel` has. Its provider is asked for memory once it has
    /// announced its blocks; [`Incoming`] has those and nothing else.
    pub fn new(guest: DestinationGuest, channel: StreamChannel, settings: StandbySettings) -> Self {
        Self { guest, channel, settings, inbox: Arc::default() }
    }

    /// Keeps the guest on a thread `ramwire-standby` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; nothing was received.
    pub fn spawn(self) -> Result<StandbyHandle, Error> {
        let (give, report) = bounded(1);
        let (spawner, inbox) = (self.settings.spawner.clone(), Arc::clone(&self.inbox));
        let job = move || {
            // Without a receiver the report is no longer needed.
            let _ = give.send(Running::new(self).run());
        };
        drop(spawner.spawn("ramwire-standby", Box::new(job))?);
        Ok(StandbyHandle { inbox, report })
    }
}

/// A standby that keeps a guest. Dropping the handle discards it, unless it was to start.
#[must_use = "dropping the handle discards the standby's guest"]
pub struct StandbyHandle {
    inbox: Arc<Inbox<StandbyEvent>>,
    report: Receiver<StandbyReport>,
}

impl StandbyHandle {
    /// Starts the guest here, from the last checkpoint that has come whole. **The source must be dead**, or kept from
    /// running its guest in another way (fencing): a source that still runs is told if it can be reached, and pauses its
    /// guest only then. Of this and [`discard`](Self::discard) the first call counts: from here on the handle may be
    /// dropped.
    pub fn activate(&self) {
        self.inbox.put(StandbyEvent::Activate);
    }

    /// There is to be no guest here, unless it was [to start](Self::activate) before.
    pub fn discard(&self) {
        self.inbox.put(StandbyEvent::Discard);
    }

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty()
    }

    /// Waits for the end. A lost connection is none: the embedder decides then.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library.
    pub fn wait(self) -> Result<StandbyReport, Error> {
        self.report.recv().map_err(|_| Error::Thread {
            name: "ramwire-standby",
            source: io::Error::other("it ended without a report, which is a fault of this library"),
        })
    }
}

impl Drop for StandbyHandle {
    fn drop(&mut self) {
        self.discard();
    }
}

/// The guest's memory, once it was announced.
struct Kept {
    cache: CheckpointCache,
    /// Announced position to position in the guest's own table.
    blocks: Vec<BlockIndex>,
}

/// What has come of the checkpoint that arrives.
#[derive(Default)]
struct Arriving {
    pages: u64,
    has_state: bool,
}

struct Running {
    guest: DestinationGuest,
    channel: StreamChannel,
    settings: StandbySettings,
    inbox: Arc<Inbox<StandbyEvent>>,
    engine: StandbyEngine,
    kept: Option<Kept>,
    arriving: Arriving,
    begun: Instant,
    error: Option<Error>,
}

impl Running {
    fn new(session: StandbySession) -> Self {
        let StandbySession { guest, mut channel, settings, inbox } = session;
        let starts_by_lease = settings.starts_by_lease;
        // A source may rest for as long as its embedder wants.
        channel.set_stall(None);
        Self {
            guest,
            channel,
            settings,
            inbox,
            engine: StandbyEngine::new(starts_by_lease),
            kept: None,
            arriving: Arriving::default(),
            begun: Instant::now(),
            error: None,
        }
    }

    fn run(mut self) -> StandbyReport {
        self.tell(StandbyEvent::Begin);
        loop {
            self.take_commands();
            if self.engine.gives_source_up() {
                // A source that was not understood learns that at once.
                self.channel.breaker().close();
            }
            match self.engine.poll() {
                Some(StandbyAction::Finish(ending)) => return self.report(ending),
                Some(action) => {
                    let done = guarded("a checkpoint is kept", || self.perform(action));
                    let event = done.and_then(|done| done).unwrap_or_else(|error| self.keep(error));
                    // A command that ended a wait counts before the wait's end.
                    self.take_commands();
                    self.tell(event);
                    if let Some(doubt) = self.engine.doubt() {
                        self.error.get_or_insert_with(|| doubted(doubt));
                    }
                }
                // Only the embedder decides now, or the lease.
                None => {
                    let _ = self.stop().sleep(Duration::MAX);
                    self.tell(StandbyEvent::Time);
                }
            }
        }
    }

    fn take_commands(&mut self) {
        for command in self.inbox.take() {
            self.tell(command);
        }
    }

    fn tell(&mut self, event: StandbyEvent) {
        self.engine.handle(self.begun.elapsed(), event);
    }

    /// Waits end when the embedder commands, or when the source's lease has run out and nothing has come.
    fn stop(&self) -> Stop {
        let stop = Stop::on(&self.inbox.wake());
        match self.engine.wake_at() {
            Some(at) => stop.within(at.saturating_sub(self.begun.elapsed())),
            None => stop,
        }
    }

    /// A wait for the source that a command or the lease has ended, in the middle of whatever came, is no loss of the source:
    /// the command counts, and a source whose guest starts here is told.
    fn keep(&mut self, error: Error) -> StandbyEvent {
        let is_stopped = matches!(error, Error::Channel(ChannelError::Stopped { .. }));
        if is_stopped && self.engine.receives() {
            self.tell(StandbyEvent::Time);
            return StandbyEvent::Done;
        }
        tracing::warn!(error = %Chain(&error), "the standby's step failed");
        self.error.get_or_insert(error);
        if self.engine.receives() { StandbyEvent::Lost } else { StandbyEvent::Failed }
    }

    fn perform(&mut self, action: StandbyAction) -> Result<StandbyEvent, Error> {
        match action {
            StandbyAction::Greet => self.greet()?,
            StandbyAction::Receive => return self.receive(),
            StandbyAction::Confirm(number) => {
                self.send(StandbyMessage::Confirm(number), &Stop::never().within(ANSWER_TIMEOUT))?;
            }
            StandbyAction::Grant(number) => {
                self.send(StandbyMessage::Grant(number), &Stop::never().within(ANSWER_TIMEOUT))?;
            }
            StandbyAction::Apply(_) => while !self.kept()?.cache.apply(APPLIED_AT_ONCE)? {},
            StandbyAction::TellTaken => {
                let message = StandbyMessage::Taken(self.engine.applied());
                let told = self.send(message, &Stop::never().within(TELL_TIMEOUT));
                self.channel.breaker().close();
                // Memory for the guest that runs here from now on.
                if let Some(kept) = &mut self.kept {
                    kept.cache.forget();
                }
                told?;
            }
            StandbyAction::Load => {
                let kept = self.kept.as_ref().ok_or_else(no_memory)?;
                let loaded = load_state(self.guest.control.as_mut(), kept.cache.state());
                loaded.map_err(|source| Error::Control { what: "load its device state", source })?;
            }
            StandbyAction::Start => {
                let started = named("calling GuestControl::resume", || self.guest.control.resume());
                started.map_err(|source| Error::Control { what: "start", source })?;
            }
            StandbyAction::AnswerRelease => {
                self.send(StandbyMessage::Released, &Stop::never().within(TELL_TIMEOUT))?;
            }
            StandbyAction::TellDiscarded => {
                self.send(StandbyMessage::Discarded, &Stop::never().within(TELL_TIMEOUT))?;
            }
            StandbyAction::Finish(_) => {}
        }
        Ok(StandbyEvent::Done)
    }

    fn send(&mut self, message: StandbyMessage, stop: &Stop) -> Result<(), Error> {
        Ok(self.channel.send(&[SendPart::Own(&message.encode())], stop)?)
    }

    fn kept(&mut self) -> Result<&mut Kept, Error> {
        self.kept.as_mut().ok_or_else(no_memory)
    }

    fn message(&mut self) -> Result<CheckpointMessage, Error> {
        let mut head = [0; HEAD_LEN];
        let stop = self.stop();
        fill(&mut self.channel, &mut head, &stop)?;
        CheckpointMessage::decode(&head).map_err(|error| Error::PeerFailed { why: error.to_string() })
    }

    fn greet(&mut self) -> Result<(), Error> {
        let CheckpointMessage::Hello { page, blocks } = self.message()? else {
            return Err(out_of_turn("a message before HELLO", "waiting for a source of checkpoints"));
        };
        let mut announced = Vec::new();
        for _ in 0..blocks.min(MAX_BLOCKS as u64) {
            announced.push(self.announced()?);
        }
        let total = announced.iter().fold(0, |sum: u64, block| sum.saturating_add(block.used_length));
        if total > self.settings.max_ram {
            let what = format!(
                "the source's guest has {total} bytes of RAM, and {} are accepted",
                self.settings.max_ram
            );
            return Err(Error::Config { what, remedy: Remedy::RaiseRamLimit });
        }
        let incoming = Incoming::of_blocks(announced);
        let memory = named("calling MemoryProvider::provide", || self.guest.memory.provide(&incoming))?;
        self.kept =
            Some(Kept { blocks: found(&incoming, &*memory, page)?, cache: CheckpointCache::new(memory)? });
        self.send(StandbyMessage::Ready, &Stop::never().within(ANSWER_TIMEOUT))
    }

    fn announced(&mut self) -> Result<RamBlock, Error> {
        let CheckpointMessage::Block { len, name } = self.message()? else {
            return Err(out_of_turn("a message before all blocks", "waiting for the source's blocks"));
        };
        let mut bytes = vec![0; name as usize];
        let stop = self.stop();
        fill(&mut self.channel, &mut bytes, &stop)?;
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let name = BlockName::new(&text).map_err(|error| Error::Guest(error.into()))?;
        Ok(RamBlock::new(name, len))
    }

    /// Messages until one of them is the engine's to know, or the embedder commands.
    fn receive(&mut self) -> Result<StandbyEvent, Error> {
        loop {
            let is_open = self.engine.is_open();
            match self.message()? {
                CheckpointMessage::Open(number) => {
                    self.arriving = Arriving::default();
                    return Ok(StandbyEvent::Opened(number));
                }
                CheckpointMessage::Pages { block, first, pages } if is_open => {
                    self.pages(block, first, pages)?;
                }
                CheckpointMessage::Zeros { block, first, pages } if is_open => {
                    self.zeros(block, first, pages)?
                }
                CheckpointMessage::State(len) if is_open => self.state(len)?,
                CheckpointMessage::Close { number, pages } if is_open => return self.close(number, pages),
                CheckpointMessage::Renew { number, nanos } => {
                    return Ok(StandbyEvent::Asked { number, time: Duration::from_nanos(nanos) });
                }
                CheckpointMessage::Release if !is_open => return Ok(StandbyEvent::Released),
                other => return Err(out_of_turn(&format!("{other:?}"), "keeping checkpoints")),
            }
        }
    }

    fn run_of(&mut self, block: BlockIndex, first: u64, pages: u64) -> Result<PageRun, Error> {
        let block = self.kept()?.blocks.get(block.as_usize()).copied().unwrap_or(BlockIndex(u32::MAX));
        Ok(PageRun { block, first: PageIndex(first), pages })
    }

    fn pages(&mut self, block: BlockIndex, first: u64, pages: u64) -> Result<(), Error> {
        let run = self.run_of(block, first, pages)?;
        let stop = self.stop();
        let kept = self.kept.as_mut().ok_or_else(no_memory)?;
        let landing = kept.cache.admit(run)?;
        let span = kept.cache.target(landing)?;
        let mut at = 0;
        while let Some(rest) = span.part(at, span.len() - at).filter(|rest| !rest.is_empty()) {
            match self.channel.recv(&mut [RecvPart::Guest(rest)], &stop)? {
                0 => return Err(ended(&self.channel)),
                got => at += got,
            }
        }
        kept.cache.commit(landing);
        self.arriving.pages = self.arriving.pages.saturating_add(pages);
        Ok(())
    }

    fn zeros(&mut self, block: BlockIndex, first: u64, pages: u64) -> Result<(), Error> {
        let run = self.run_of(block, first, pages)?;
        let cache = &mut self.kept()?.cache;
        let landing = cache.admit(run)?;
        cache.zero(landing);
        self.arriving.pages = self.arriving.pages.saturating_add(pages);
        Ok(())
    }

    fn state(&mut self, len: u64) -> Result<(), Error> {
        if len > self.settings.max_state {
            return Err(out_of_turn("more device state than is accepted", "keeping checkpoints"));
        }
        let mut state = Vec::new();
        while (state.len() as u64) < len {
            let have = state.len();
            state.resize(have + (len - have as u64).min(STATE_PIECE) as usize, 0);
            let stop = self.stop();
            fill(&mut self.channel, &mut state[have..], &stop)?;
        }
        self.kept()?.cache.set_state(state);
        self.arriving.has_state = true;
        Ok(())
    }

    fn close(&mut self, number: u64, pages: u64) -> Result<StandbyEvent, Error> {
        let arriving = std::mem::take(&mut self.arriving);
        if arriving.pages != pages || !arriving.has_state {
            let what = format!("the end of a checkpoint of {pages} pages, of which {} came", arriving.pages);
            return Err(out_of_turn(&what, "keeping checkpoints"));
        }
        Ok(StandbyEvent::Whole(number))
    }

    fn report(self, ending: StandbyEnding) -> StandbyReport {
        StandbyReport {
            ending,
            error: self.error,
            last: self.engine.applied(),
            by_lease: self.engine.starts_by_lease(),
        }
    }
}

fn doubted(doubt: StandbyDoubt) -> Error {
    let what = match doubt {
        StandbyDoubt::Opened { number, due } => {
            format!("the beginning of checkpoint {number}, where that or the end of {due} was due")
        }
        StandbyDoubt::Closed { number, due: Some(due) } => {
            format!("the end of checkpoint {number}, where {due} had begun")
        }
        StandbyDoubt::Closed { number, due: None } => {
            format!("the end of checkpoint {number}, where none had begun")
        }
    };
    out_of_turn(&what, "keeping checkpoints")
}

/// Where the announced blocks are in the guest's own table.
fn found(incoming: &Incoming, memory: &dyn GuestMemory, page: u32) -> Result<Vec<BlockIndex>, Error> {
    refuse_ignored(memory)?;
    let table = memory.table();
    if table.page().bytes() != u64::from(page) {
        let what = format!("the source has pages of {page} bytes, this guest of {}", table.page().bytes());
        return Err(Error::Config { what, remedy: Remedy::Advice("start both ends with the same machine") });
    }
    same_blocks(&incoming.blocks, table)
}

fn fill(channel: &mut StreamChannel, mut into: &mut [u8], stop: &Stop) -> Result<(), Error> {
    while !into.is_empty() {
        match channel.recv(&mut [RecvPart::Own(into)], stop)? {
            0 => return Err(ended(channel)),
            got => into = &mut into[got..],
        }
    }
    Ok(())
}

fn ended(channel: &StreamChannel) -> Error {
    ChannelError::Closed { peer: channel.peer().to_owned(), doing: "keeping checkpoints" }.into()
}

fn no_memory() -> Error {
    out_of_turn("a checkpoint", "waiting for the source's blocks")
}

fn out_of_turn(what: &str, while_doing: &'static str) -> Error {
    Error::OutOfTurn { what: what.to_owned(), at: None, while_doing }
}
