//! The source's session: does what the engine decides, on one thread.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, bounded};

use super::inbox::Inbox;
use super::{CheckpointObserver, CheckpointReport, CheckpointSettings, refuse_ignored};
use crate::engine::{
    CheckpointAction, CheckpointConfig, CheckpointEngine, CheckpointEvent, CheckpointOutcome,
};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestError, save_state, span_of, sync_all};
use crate::observe::Latency;
use crate::page::{PageSearch, ZeroDetection, classify};
use crate::ram::{ClearShift, DirtyMap, PageBatch, PageRun, Verdict};
use crate::session::callback::{guarded, named};
use crate::session::{Error, SourceGuest};
use crate::stream::checkpoints::{CheckpointMessage, HEAD_LEN, MAX_RUN, StandbyMessage};
use crate::sys::{CancelToken, RecvPart, SendPart, Stop};
use crate::transport::{ByteSink, ByteSource, ChannelError, StreamChannel};
use crate::units::PageIndex;

/// Whole pages that are sent by one call.
const BATCH: u64 = 512;

/// A guest that is to be protected by a standby ([`StandbySession`](crate::session::StandbySession)).
pub struct CheckpointSession {
    guest: SourceGuest,
    channel: StreamChannel,
    observer: Box<dyn CheckpointObserver>,
    settings: CheckpointSettings,
    inbox: Arc<Inbox<CheckpointEvent>>,
}

impl CheckpointSession {
    /// Protects `guest` over a connection in both directions. `observer` learns which checkpoints are safe.
    ///
    /// # Errors
    /// [`Error::Config`] for a guest without dirty sources, or with memory that is left out.
    pub fn new(
        guest: SourceGuest,
        channel: StreamChannel,
        observer: Box<dyn CheckpointObserver>,
        settings: CheckpointSettings,
    ) -> Result<Self, Error> {
        if guest.dirty.is_empty() {
            return Err(Error::Config {
                what: "no dirty source: a checkpoint would not know what the guest has written".into(),
                remedy: Remedy::Advice("give a source for each of its writers"),
            });
        }
        refuse_ignored(&*guest.memory)?;
        Ok(Self { guest, channel, observer, settings, inbox: Arc::default() })
    }

    /// Protects the guest on a thread `ramwire-ckpt` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; the guest was not touched.
    pub fn spawn(self) -> Result<CheckpointHandle, Error> {
        let (give, report) = bounded(1);
        let (spawner, inbox) = (self.settings.spawner.clone(), Arc::clone(&self.inbox));
        let job = move || {
            // Without a receiver the report is no longer needed.
            let _ = give.send(Running::new(self).run());
        };
        drop(spawner.spawn("ramwire-ckpt", Box::new(job))?);
        Ok(CheckpointHandle { inbox, report })
    }
}

/// A guest that is protected. Dropping the handle ends the protection.
#[must_use = "dropping the handle ends the protection"]
pub struct CheckpointHandle {
    inbox: Arc<Inbox<CheckpointEvent>>,
    report: Receiver<CheckpointReport>,
}

impl CheckpointHandle {
    /// Wants a checkpoint now: it is taken as soon as the one before is safe.
    pub fn checkpoint(&self) {
        self.inbox.put(CheckpointEvent::Demand);
    }

    /// Ends the protection: the standby forgets the guest, which runs on here. A checkpoint that is under way is finished
    /// before.
    pub fn stop(&self) {
        self.inbox.put(CheckpointEvent::Stop);
    }

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library.
    pub fn wait(self) -> Result<CheckpointReport, Error> {
        self.report.recv().map_err(|_| Error::Thread {
            name: "ramwire-ckpt",
            source: io::Error::other("it ended without a report, which is a fault of this library"),
        })
    }
}

impl Drop for CheckpointHandle {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The messages of the standby.
struct Answers {
    channel: StreamChannel,
    head: [u8; HEAD_LEN],
    have: usize,
}

impl Answers {
    /// The next message; `None` if the wait was stopped.
    fn next(&mut self, stop: &Stop) -> Result<Option<StandbyMessage>, Error> {
        while self.have < HEAD_LEN {
            match self.channel.recv(&mut [RecvPart::Own(&mut self.head[self.have..])], stop) {
                Ok(0) => {
                    let peer = self.channel.peer().to_owned();
                    return Err(ChannelError::Closed { peer, doing: "waiting for the standby" }.into());
                }
                Ok(got) => self.have += got,
                Err(ChannelError::Stopped { .. }) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
        self.have = 0;
        let message = StandbyMessage::decode(&self.head);
        Ok(Some(message.map_err(|error| Error::PeerFailed { why: error.to_string() })?))
    }
}

/// The pages that are dirty.
struct Pages {
    dirty: DirtyMap,
    search: PageSearch,
    batch: PageBatch,
}

#[derive(Default)]
struct Figures {
    safe: u64,
    pages: u64,
    /// Pages of the checkpoint that is sent.
    in_checkpoint: u64,
    pauses: Latency,
    paused_at: Option<Instant>,
    not_resumed: bool,
}

struct Running {
    guest: SourceGuest,
    sink: StreamChannel,
    answers: Option<Answers>,
    observer: Box<dyn CheckpointObserver>,
    settings: CheckpointSettings,
    inbox: Arc<Inbox<CheckpointEvent>>,
    engine: CheckpointEngine,
    pages: Pages,
    figures: Figures,
    begun: Instant,
    error: Option<Error>,
}

impl Running {
    fn new(session: CheckpointSession) -> Self {
        let CheckpointSession { guest, channel, observer, settings, inbox } = session;
        let table = guest.memory.table();
        let config = CheckpointConfig {
            interval: settings.interval,
            live_rounds: settings.live_rounds,
            live_pages: settings.live_bytes / table.page().bytes(),
            confirm_timeout: settings.confirm_timeout,
        };
        let dirty = DirtyMap::new(table, ClearShift::default());
        let (sink, back) = channel.with_return_path();
        Self {
            engine: CheckpointEngine::new(config),
            pages: Pages { dirty, search: PageSearch::default(), batch: PageBatch::default() },
            answers: back.map(|channel| Answers { channel, head: [0; HEAD_LEN], have: 0 }),
            guest,
            sink,
            observer,
            settings,
            inbox,
            figures: Figures::default(),
            begun: Instant::now(),
            error: None,
        }
    }

    fn run(mut self) -> CheckpointReport {
        self.tell(CheckpointEvent::Begin);
        loop {
            for command in self.inbox.take() {
                self.tell(command);
            }
            match self.engine.poll() {
                Some(CheckpointAction::Finish(outcome)) => return self.report(outcome),
                Some(action) => {
                    let done = guarded("a checkpoint is taken", || self.perform(action));
                    match done.and_then(|done| done) {
                        Ok(event) => self.tell(event),
                        Err(error) => self.failed(error, CheckpointEvent::Failed),
                    }
                }
                None => self.wait(),
            }
        }
    }

    fn tell(&mut self, event: CheckpointEvent) {
        self.engine.handle(self.begun.elapsed(), event);
    }

    /// A standby that has taken the guest closes the connection: its last message says so.
    fn failed(&mut self, error: Error, event: CheckpointEvent) {
        tracing::warn!(error = %Chain(&error), "a checkpoint failed");
        self.error.get_or_insert(error);
        self.tell(event);
        while let Some(answers) = &mut self.answers {
            match answers.next(&Stop::never().within(Duration::ZERO)) {
                Ok(Some(message)) => self.answered(message),
                Ok(None) | Err(_) => break,
            }
        }
        if event == CheckpointEvent::Lost {
            self.answers = None;
        }
    }

    fn answered(&mut self, message: StandbyMessage) {
        match message {
            StandbyMessage::Confirm(number) => self.tell(CheckpointEvent::Confirmed(number)),
            StandbyMessage::Taken(_) => self.tell(CheckpointEvent::Taken),
            // Only where they are waited for.
            StandbyMessage::Ready | StandbyMessage::Released => {
                self.error.get_or_insert(out_of_turn());
                self.tell(CheckpointEvent::Lost);
            }
        }
    }

    /// Until the standby answers, it is time for something, or the embedder commands.
    fn wait(&mut self) {
        let stop = Stop::on(&self.inbox.wake());
        let stop = match self.engine.wake_at() {
            Some(at) => stop.within(at.saturating_sub(self.begun.elapsed())),
            None => stop,
        };
        self.listen(&stop);
        self.tell(CheckpointEvent::Time);
    }

    /// Takes one message, if one comes.
    fn listen(&mut self, stop: &Stop) {
        let Some(answers) = &mut self.answers else {
            self.error.get_or_insert(one_way());
            return self.tell(CheckpointEvent::Lost);
        };
        match answers.next(stop) {
            Ok(Some(message)) => self.answered(message),
            Ok(None) => {}
            Err(error) => self.failed(error, CheckpointEvent::Lost),
        }
    }

    fn perform(&mut self, action: CheckpointAction) -> Result<CheckpointEvent, Error> {
        match action {
            CheckpointAction::StartLogs => {
                self.pages.dirty.set_all(self.guest.memory.table());
                for source in &self.guest.dirty {
                    named("calling DirtySource::start", || source.start())?;
                }
            }
            CheckpointAction::Greet => self.greet()?,
            CheckpointAction::Open(number) => {
                self.figures.in_checkpoint = 0;
                self.send(&CheckpointMessage::Open(number).encode())?;
            }
            CheckpointAction::Sync => {
                sync_all(&self.guest.dirty, self.guest.memory.table(), &mut self.pages.dirty)?;
                return Ok(CheckpointEvent::Synced { dirty_pages: self.pages.dirty.count() });
            }
            CheckpointAction::Send => self.send_dirty()?,
            CheckpointAction::Pause => {
                self.figures.paused_at = Some(Instant::now());
                self.figures.not_resumed = true;
                let paused = named("calling GuestControl::pause", || self.guest.control.pause());
                paused.map_err(|source| Error::Control { what: "pause", source })?;
            }
            CheckpointAction::SaveState(number) => self.save_state(number)?,
            CheckpointAction::Close(number) => {
                let pages = self.figures.in_checkpoint;
                self.send(&CheckpointMessage::Close { number, pages }.encode())?;
            }
            CheckpointAction::Resume => {
                let resumed = named("calling GuestControl::resume", || self.guest.control.resume());
                resumed.map_err(|source| Error::Control { what: "resume", source })?;
                self.figures.not_resumed = false;
                if let Some(paused_at) = self.figures.paused_at.take() {
                    self.figures.pauses.record(paused_at.elapsed());
                }
            }
            CheckpointAction::ReportSafe(number) => {
                self.figures.safe = number;
                named("calling CheckpointObserver::safe", || self.observer.safe(number));
            }
            CheckpointAction::Release => self.release()?,
            CheckpointAction::StopLogs => {
                // Every source is stopped, even if an earlier one refuses.
                let stop = |source: &Arc<dyn crate::guest::DirtySource>| -> Result<(), Error> {
                    Ok(guarded("calling DirtySource::stop", || source.stop())??)
                };
                let results: Vec<_> = self.guest.dirty.iter().map(stop).collect();
                results.into_iter().collect::<Result<(), Error>>()?;
            }
            CheckpointAction::Finish(_) => {}
        }
        Ok(CheckpointEvent::Done)
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.sink.send(&[SendPart::Own(bytes)], &Stop::never())?)
    }

    fn greet(&mut self) -> Result<(), Error> {
        let table = self.guest.memory.table();
        let (page, blocks) = (table.page().bytes() as u32, table.blocks().len() as u64);
        let mut out = CheckpointMessage::Hello { page, blocks }.encode().to_vec();
        for block in table.blocks() {
            let name = block.name.as_str().as_bytes();
            let head = CheckpointMessage::Block { len: block.used_length, name: name.len() as u64 };
            out.extend_from_slice(&head.encode());
            out.extend_from_slice(name);
        }
        self.send(&out)?;
        self.await_answer(StandbyMessage::Ready, "that it has memory")
    }

    fn release(&mut self) -> Result<(), Error> {
        self.send(&CheckpointMessage::Release.encode())?;
        self.await_answer(StandbyMessage::Released, "that it has forgotten the guest")
    }

    fn await_answer(&mut self, due: StandbyMessage, what: &'static str) -> Result<(), Error> {
        let after = self.settings.confirm_timeout;
        let stop = Stop::on(&CancelToken::default()).within(after);
        let answers = self.answers.as_mut().ok_or_else(one_way)?;
        match answers.next(&stop)? {
            Some(message) if message == due => Ok(()),
            Some(StandbyMessage::Taken(number)) => {
                self.answered(StandbyMessage::Taken(number));
                Ok(())
            }
            Some(_) => Err(out_of_turn()),
            None => {
                let remedy =
                    Remedy::Advice("see whether its host is overloaded, or raise the confirm timeout");
                Err(Error::NoAnswer { what, after, remedy })
            }
        }
    }

    /// Sends all dirty pages, a batch at a time.
    fn send_dirty(&mut self) -> Result<(), Error> {
        loop {
            // Not later: a standby that starts the guest is not sent all that is left first.
            self.listen(&Stop::never().within(Duration::ZERO));
            if self.engine.is_ending() {
                return Ok(());
            }
            self.pages.batch.clear();
            while self.pages.batch.whole_pages() < BATCH {
                let room = BATCH - self.pages.batch.whole_pages();
                let Some(run) = self.pages.search.next_run(&mut self.pages.dirty, room) else { break };
                // The bits are cleared, now the log is armed again, only then are the bytes read.
                if let Some(chunk) = self.pages.dirty.take_clear_chunk(run) {
                    for source in &self.guest.dirty {
                        named("calling DirtySource::reprotect", || source.reprotect(chunk))?;
                    }
                }
                classify(&*self.guest.memory, run, ZeroDetection::Legacy, &mut self.pages.batch)?;
            }
            if self.pages.batch.is_empty() {
                return Ok(());
            }
            self.send_batch()?;
        }
    }

    fn send_batch(&mut self) -> Result<(), Error> {
        let memory = &*self.guest.memory;
        let mut messages = Vec::new();
        for piece in self.pages.batch.pieces() {
            let PageRun { block, first, pages } = piece.run;
            match piece.verdict {
                Verdict::Zero => {
                    let head = CheckpointMessage::Zeros { block, first: first.0, pages };
                    messages.push((head.encode(), None));
                }
                _ => {
                    for at in (0..pages).step_by(MAX_RUN as usize) {
                        let (first, pages) = (first.0 + at, MAX_RUN.min(pages - at));
                        let run = PageRun { block, first: PageIndex(first), pages };
                        let landing = memory.table().admit_run(run).map_err(GuestError::from)?;
                        let head = CheckpointMessage::Pages { block, first, pages };
                        messages.push((head.encode(), Some(span_of(memory, landing)?)));
                    }
                }
            }
        }
        let parts = messages
            .iter()
            .flat_map(|(head, span)| std::iter::once(SendPart::Own(head)).chain(span.map(SendPart::Guest)));
        self.sink.send(&parts.collect::<Vec<_>>(), &Stop::never())?;
        self.figures.in_checkpoint += self.pages.batch.pages();
        self.figures.pages += self.pages.batch.pages();
        Ok(())
    }

    fn save_state(&mut self, number: u64) -> Result<(), Error> {
        let saved = save_state(self.guest.control.as_mut());
        let state = saved.map_err(|source| Error::Control { what: "save its device state", source })?;
        named("calling CheckpointObserver::taken", || self.observer.taken(number));
        let head = CheckpointMessage::State(state.len() as u64).encode();
        Ok(self.sink.send(&[SendPart::Own(&head), SendPart::Own(&state)], &Stop::never())?)
    }

    fn report(self, outcome: CheckpointOutcome) -> CheckpointReport {
        let figures = self.figures;
        CheckpointReport {
            outcome,
            error: self.error,
            safe: figures.safe,
            pages: figures.pages,
            bytes: self.sink.position(),
            pauses: figures.pauses.summary(),
            not_resumed: figures.not_resumed && outcome != CheckpointOutcome::Taken,
        }
    }
}

fn out_of_turn() -> Error {
    Error::OutOfTurn {
        what: "a message that was not due".into(),
        at: None,
        while_doing: "checkpoints are taken",
    }
}

fn one_way() -> Error {
    Error::Config {
        what: "a standby's answers can't come on this connection".into(),
        remedy: Remedy::Advice("use a connection of both directions"),
    }
}
