//! The pages that are missing at the peer after a switch to postcopy: requested ones first, the others behind them.
//!
//! # Order that must hold
//!
//! The target pages of a host page leave together.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{Background, NextMissing, Pace, Release, ServedKeys, SourceEvent};
use crate::guest::GuestMemory;
use crate::page::{ZeroDetection, classify};
use crate::ram::{PageBatch, PageRun};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::ram::EOS_RECORD;
use crate::stream::qemu::section::encode_part;
use crate::transport::{ChannelError, InlinePages};
use crate::units::{BlockIndex, BlockOffset};

use super::SourceSession;
use super::behind::Behind;
use super::postcopy::pages_of_host_page;
use super::recovery::Recovery;
use super::return_path::PageRequest;
use super::wire::Wire;
use crate::session::{Breakage, Error};

/// Whole pages of a batch of background pages: few, so that a request does not wait for many of them.
pub(super) const BACKGROUND_PAGES: u64 = 16;
/// Pages of such a batch, zero ones included.
const BACKGROUND_LOOKS: u64 = 64;
/// Interval between two checks whether a page channel has room again; requests are taken at once.
const ROOM_CHECK_INTERVAL: Duration = Duration::from_micros(200);

/// What the source keeps for the pages that are missing at the peer.
pub(super) struct Missing {
    /// Writes records after the switchover: the first names its block, and none is a difference.
    pages: InlinePages,
    /// Limits the background pages in flight.
    pub(super) background: Background,
    /// The block of the last request that named one.
    asked_block: Option<BlockIndex>,
    /// The unsent part of a host page that was sent in part, and whether it was requested.
    pub(super) rest: Option<PageRun>,
    pub(super) rest_is_asked: bool,
    /// Pages that left on the connection for urgent ones.
    pub(super) urgent_pages: u64,
    pub(super) recovery: Recovery,
    /// Pages that may be released; `None`: none.
    pub(super) release: Option<Release>,
    /// The peer reads the missing pages itself.
    pub(super) served: Option<ServedKeys>,
    /// A relay's: the guest's own source, from its switch on.
    pub(super) behind: Option<Box<dyn Behind>>,
}

impl Missing {
    pub(super) fn new(memory: Arc<dyn GuestMemory>, pace: Pace) -> Self {
        Self {
            pages: InlinePages::new(memory),
            background: Background::new(pace),
            asked_block: None,
            rest: None,
            rest_is_asked: false,
            urgent_pages: 0,
            recovery: Recovery::default(),
            release: None,
            served: None,
            behind: None,
        }
    }

    /// Another connection follows: on it the first record names its block, and so does the first request.
    pub(super) fn forget_connection(&mut self, memory: &Arc<dyn GuestMemory>, breakage: Breakage) {
        self.asked_block = None;
        // Another connection carries them.
        self.served = None;
        (self.rest, self.rest_is_asked) = (None, false);
        self.background.forget_connection();
        if let Some(release) = &mut self.release {
            release.forget_connection();
        }
        if !breakage.is(Breakage::KeepCurrentBlock) {
            self.pages = InlinePages::new(Arc::clone(memory));
        }
    }
}

impl SourceSession {
    /// Sends missing pages until none is left, or until the engine calls. Requests are taken between any two batches.
    pub(super) fn send_missing(&mut self) -> Result<SourceEvent, Error> {
        self.check_layout()?;
        if self.missing.served.is_some() {
            return self.serve_reads();
        }
        let before = self.wire.position();
        let mut open = false;
        loop {
            self.poll_return_path()?;
            self.take_what_came();
            if self.awaits_more() {
                if self.driver.is_called() {
                    break;
                }
                self.await_more()?;
                continue;
            }
            let now = self.driver.clock.now();
            let asked = self.pages.search.is_asked();
            let channels = self.room_on_channels();
            let next = self.missing.background.next(now, asked || self.missing.rest_is_asked, channels);
            match next {
                NextMissing::Requested if asked && self.send_requested()? => {
                    if self.driver.is_called() {
                        break;
                    }
                    continue;
                }
                // They have left meanwhile. Nothing else goes on the main connection where there are page channels.
                NextMissing::Requested if asked && channels.is_some() && self.wire.urgent.is_some() => {
                    continue;
                }
                NextMissing::Requested | NextMissing::Background => {}
                NextMissing::Full if self.breakage.is(Breakage::FillUnbounded) => {}
                _ if self.driver.is_called() || self.pages.dirty.count() == 0 => break,
                _ if self.release_some() => continue,
                NextMissing::Spread => {
                    self.wire.flush()?;
                    self.spread()?;
                    continue;
                }
                NextMissing::Crowded => {
                    self.wire.flush()?;
                    self.listen_for(ROOM_CHECK_INTERVAL)?;
                    continue;
                }
                NextMissing::Pause(delay) => {
                    let left = self.driver.engine.wake_at().map_or(delay, |at| at.saturating_sub(now));
                    self.listen_for(delay.min(left))?;
                    continue;
                }
                NextMissing::Full => {
                    self.await_message()?;
                    continue;
                }
            }
            if next == NextMissing::Background {
                self.release_some();
            }
            let batch = self.next_missing()?;
            if batch.is_empty() {
                self.pages.done_with(batch);
                break;
            }
            if !open {
                let mut head = Vec::new();
                encode_part(self.settings.ram_section, &mut head);
                self.wire.send(&head)?;
                open = true;
            }
            self.write_missing(batch, next == NextMissing::Requested)?;
            self.write_mark()?;
            if self.driver.is_called() || self.breakage.is(Breakage::EndEarly) {
                break;
            }
        }
        if open {
            let mut tail = EOS_RECORD.to_vec();
            self.settings.framing.encode_footer(self.settings.ram_section, &mut tail);
            self.wire.send(&tail)?;
        }
        self.wire.link.sink().flush(&self.wire.stop)?;
        let position = self.wire.position();
        self.figures.position(position);
        if self.wire.link.page_channels() > 0 {
            self.figures.channel_bytes(self.wire.channel_bytes());
        }
        self.figures.postcopy(position - before);
        let pages_left = self.pages_missing();
        self.figures.sent(self.driver.clock.now(), position - before, pages_left, None);
        let pages_left = if self.breakage.is(Breakage::EndEarly) { 0 } else { pages_left };
        Ok(SourceEvent::Filled { pages_left })
    }

    /// Requested pages, alone; otherwise a few background pages. Always whole host pages.
    fn next_missing(&mut self) -> Result<PageBatch, Error> {
        let mut batch = self.pages.fresh_batch();
        if self.wire.urgent.is_some() {
            self.gather_pieces(&mut batch)?;
            return Ok(batch);
        }
        let asked = self.pages.search.is_asked();
        while batch.whole_pages() < BACKGROUND_PAGES && batch.pages() < BACKGROUND_LOOKS {
            let room = BACKGROUND_PAGES - batch.whole_pages();
            let Some(run) = self.pages.next_run(room) else { break };
            let seen = self.classify_missing(run, self.settings.zero_detection.with(false), &mut batch);
            seen.inspect_err(|_| {
                self.pages.dirty.set_run(run);
                self.pages.mark_unsent(&batch);
            })?;
            if asked {
                break;
            }
        }
        Ok(batch)
    }

    /// A few background pages. A host page may be sent in pieces, since pages that are requested meanwhile use another
    /// connection; its pieces follow each other.
    fn gather_pieces(&mut self, batch: &mut PageBatch) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        let detection = self.settings.zero_detection.with(false);
        while batch.whole_pages() < BACKGROUND_PAGES && batch.pages() < BACKGROUND_LOOKS {
            let room = BACKGROUND_PAGES - batch.whole_pages();
            let run = match self.missing.rest {
                Some(rest) => self.pages.dirty.take_run(rest.block, rest.first, room.min(rest.pages)),
                None => self.pages.next_run(room),
            };
            let Some(run) = run else { break };
            let Some(block) = memory.table().get(run.block) else { break };
            let boundary = run.end().0.next_multiple_of(pages_of_host_page(&*memory, block));
            let left = boundary - run.end().0;
            self.missing.rest =
                (left > 0).then_some(PageRun { block: run.block, first: run.end(), pages: left });
            self.missing.rest_is_asked &= left > 0;
            let seen = classify(&*memory, run, detection, batch);
            seen.inspect_err(|_| {
                self.pages.dirty.set_run(run);
                self.pages.mark_unsent(batch);
            })?;
        }
        Ok(())
    }

    /// Adds `run` and the missing rest of its last host page. The guest is paused: no log is armed.
    pub(super) fn classify_missing(
        &mut self,
        run: PageRun,
        detection: ZeroDetection,
        batch: &mut PageBatch,
    ) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        classify(&*memory, run, detection, batch)?;
        let Some(block) = memory.table().get(run.block) else { return Ok(()) };
        let boundary = run.end().0.next_multiple_of(pages_of_host_page(&*memory, block));
        let mut end = run.end();
        while end.0 < boundary
            && let Some(more) = self.pages.dirty.take_run(run.block, end, boundary - end.0)
        {
            debug_assert_eq!(more.first, end, "host pages are dirty as a whole");
            end = more.end();
            classify(&*memory, more, detection, batch)?;
        }
        Ok(())
    }

    /// Sends a batch; requested pages have no limit.
    fn write_missing(&mut self, batch: PageBatch, asked: bool) -> Result<(), Error> {
        let (now, before) = (self.driver.clock.now(), self.wire.position());
        let begun = Instant::now();
        let Self { missing, wire: Wire { link, stop, .. }, .. } = self;
        if let Err(error) = missing.pages.write(&batch, link.sink(), stop) {
            self.pages.mark_unsent(&batch);
            return Err(error.into());
        }
        let bytes = self.wire.position() - before;
        self.missing.background.sent(now, batch.pages(), bytes, asked);
        self.figures.offered(begun.elapsed());
        self.figures.counted(&batch);
        if let Some(release) = &mut self.missing.release {
            release.sent(&batch);
        }
        self.pages.done_with(batch);
        Ok(())
    }

    /// Between two sections, if it is time for one: a PING whose answer shows how far the peer has read.
    fn write_mark(&mut self) -> Result<(), Error> {
        let now = self.driver.clock.now();
        let Some(mark) = self.missing.background.mark(now) else { return Ok(()) };
        let mut out = EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(self.settings.ram_section, &mut out);
        Command::Ping(mark).encode(&mut out);
        if let Some(release) = &mut self.missing.release {
            release.marked(mark);
            if self.breakage.is(Breakage::ReleaseSent) {
                release.answered(mark);
            }
        }
        encode_part(self.settings.ram_section, &mut out);
        Ok(self.wire.send(&out)?)
    }

    /// The peer has as much as it can place for now: takes its next message, which makes room or requests a page.
    fn await_message(&mut self) -> Result<(), Error> {
        self.wire.link.sink().flush(&self.wire.stop)?;
        let after = self.settings.stall_timeout;
        let stop = self.wire.stop.within(after);
        let Some(back) = &mut self.wire.back else { return Ok(()) };
        match back.next(&stop) {
            Ok(message) => self.take_message(message),
            Err(error) if error.is_deadline() => {
                let peer = "the destination".into();
                Err(ChannelError::Stalled { peer, doing: "sending missing pages", after }.into())
            }
            Err(error) => Err(error),
        }
    }

    /// Requested pages. A page that was sent already is in flight: it is not sent again, and requesting it is no fault.
    pub(super) fn requested(&mut self, request: &PageRequest) -> Result<(), Error> {
        let &PageRequest { ref block, start, length } = request;
        let memory = Arc::clone(&self.guest.memory);
        let table = memory.table();
        let refused = |why: String| Error::OutOfTurn {
            what: format!("a request for {length} bytes at {start:#x}, {why},"),
            at: None,
            while_doing: "pages are missing there",
        };
        if let Some(name) = block {
            self.missing.asked_block = Some(table.find(name).map_err(|error| refused(error.to_string()))?);
        }
        let index = self.missing.asked_block.ok_or_else(|| refused("which names no RAM block".into()))?;
        let Some(block) = table.get(index) else { return Ok(()) };
        let host_page = block.host_page.bytes();
        let length = u64::from(length);
        if length == 0 || start % host_page != 0 || length % host_page != 0 {
            return Err(refused(format!(
                "not whole host pages of {host_page} bytes of RAM block {}",
                block.name
            )));
        }
        let landing = table
            .admit(index, BlockOffset(start), length)
            .map_err(|error| refused(format!("which is refused: {error}")))?;
        let run = landing.run(table.page());
        self.figures.requested();
        if let Some(served) = &mut self.missing.served {
            served.want(run);
            return Ok(());
        }
        if self.missing.behind.as_mut().is_some_and(|behind| behind.ask(run)) {
            return Ok(());
        }
        let dirty = self.pages.dirty.block(index).and_then(|dirty| dirty.next_run(run.first, 1));
        if dirty.is_some_and(|found| found.start < run.end().0) {
            self.pages.search.request(run);
        }
        Ok(())
    }
}
