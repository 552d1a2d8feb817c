//! Postcopy at the source: the dirty pages are discarded, the guest is handed over in a package, and its missing pages
//! follow, requested ones first.
//!
//! # Orders that must hold
//!
//! The dirty pages are discarded before RUN, which is the last command of the package and commits. The target pages of
//! a host page leave together. The end is sent when no page is dirty and the peer has taken the guest.

use std::sync::Arc;

use crate::engine::{Background, Handover, NextMissing, Pace, Release, SourceEvent};
use crate::error::Remedy;
use crate::guest::{GuestMemory, save_state};
use crate::page::{PageSearch, classify};
use crate::ram::{PageBatch, PageRun, RamBlock};
use crate::stream::native::encode_state_section;
use crate::stream::qemu::command::{Command, HEAD_LEN, encode_discards};
use crate::stream::qemu::package::encode_package;
use crate::stream::qemu::ram::EOS_RECORD;
use crate::stream::qemu::section::{encode_end, encode_eof, encode_part};
use crate::transport::{ChannelError, InlinePages};
use crate::units::{BlockIndex, BlockOffset, PageIndex};

use super::SourceSession;
use super::behind::Behind;
use super::handover::commit_at;
use super::peer::refuse_verdict;
use super::recovery::Recovery;
use super::return_path::{PageRequest, PeerMessage, check_deadline};
use super::setup;
use super::urgent;
use super::wire::Wire;
use crate::session::config::Verify;
use crate::session::{Breakage, Error};

/// Whole pages of a batch of background pages: few, so that a request does not wait for many of them.
pub(super) const BACKGROUND_PAGES: u64 = 16;
/// Pages of such a batch, zero ones included.
const BACKGROUND_LOOKS: u64 = 64;
/// Bytes of discards that leave together.
const DISCARDS: usize = 64 << 10;
/// PING before the package, and after it.
const PING_DISCARDED: u32 = 2;
const PING_PACKAGED: u32 = 4;

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
            behind: None,
        }
    }

    /// Another connection follows: on it the first record names its block, and so does the first request.
    pub(super) fn forget_connection(&mut self, memory: &Arc<dyn GuestMemory>, breakage: Breakage) {
        self.asked_block = None;
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

/// Host page sizes of the migrated blocks, ORed, in bytes: what both ends of a postcopy must have in common.
pub(super) fn host_pages(blocks: &[RamBlock]) -> u64 {
    let travels = blocks.iter().filter(|block| !block.flags.ignored);
    travels.fold(0, |all, block| all | block.host_page.bytes())
}

impl SourceSession {
    /// What can't be switched to postcopy is refused before the first byte.
    pub(super) fn refuse_postcopy(&self) -> Result<(), Error> {
        let asked = self.settings.postcopy.is_some();
        let on_timeout = matches!(self.settings.timeout, Some((_, crate::engine::OnTimeout::Postcopy)));
        let refused = |why: &str, remedy| {
            let what = format!("postcopy was asked for, and {why}");
            Err(Error::Config { what, remedy: Remedy::Advice(remedy) })
        };
        let table = self.guest.memory.table();
        match () {
            () if !asked && on_timeout => refused(
                "the destination is not told that it may come",
                "set SourceSettings::postcopy, or let the timeout cancel or finish",
            ),
            () if !asked => Ok(()),
            () if self.wire.back.is_none() => refused(
                "the connection carries no answers",
                "migrate over a connection of both directions (tcp:, unix:)",
            ),
            () if urgent::time_of(&self.settings).is_some() && !self.missing.recovery.can_connect() => {
                refused(
                    "nothing tells how the connection for urgent pages is made",
                    "say it (SourceSession::with_reconnect), or let urgent pages go with the others",
                )
            }
            () if self.settings.verify == Verify::Full => {
                refused("a digest can't be compared while pages are missing", "ask for one of them")
            }
            () if self.settings.verify == Verify::Fast => refused(
                "fingerprints are compared before the guest is handed over, and pages would be missing then",
                "ask for one of them",
            ),
            () if self.wire.link.abilities().registers_memory || self.wire.link.page_channels() > 0 => {
                refused(
                    "its pages travel in the stream only",
                    "use a tcp: or unix: address, without page channels",
                )
            }
            // A relay's pages are those that its source sends, or discards.
            () if !self.settings.all_dirty_at_start && self.upstream.is_none() => refused(
                "pages that are not sent would be missing for ever",
                "send every page at least once (SourceSettings::all_dirty_at_start)",
            ),
            () if self.pages.skips.has_discards() => refused(
                "this guest has memory that can't be read while it is unplugged",
                "migrate it in precopy",
            ),
            () if table.blocks().iter().any(|block| block.flags.ignored) => refused(
                "some RAM blocks are shared by both ends",
                "let all blocks travel, or migrate in precopy",
            ),
            () => Ok(()),
        }
    }

    /// Announces that postcopy may follow; the peer empties its memory for it.
    pub(super) fn advise(&mut self) -> Result<(), Error> {
        if self.settings.postcopy.is_none() {
            return Ok(());
        }
        let table = self.guest.memory.table();
        let (host_pages, target_page) = (host_pages(table.blocks()), table.page().bytes());
        let mut out = Vec::new();
        Command::PostcopyAdvise { host_pages, target_page }.encode(&mut out);
        Ok(self.wire.send(&out)?)
    }

    /// Tells the peer to discard the pages that are dirty here, in whole host pages, and at least one of them: a QEMU
    /// that was told to discard nothing does not start the guest.
    pub(super) fn send_discards(&mut self) -> Result<SourceEvent, Error> {
        // The search may be in the middle of a host page, which is to be sent from its start.
        self.pages.search = PageSearch::default();
        // A page that was left out is missing there, and may be requested.
        self.pages.skip_no_more(self.breakage);
        let memory = Arc::clone(&self.guest.memory);
        let table = memory.table();
        self.add_absent();
        for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
            self.pages.dirty.widen(index, pages_of_host_page(&*memory, block));
        }
        if self.pages.dirty.count() == 0
            && let Some(block) = table.blocks().first()
        {
            let pages = pages_of_host_page(&*memory, block);
            self.pages.dirty.set_run(PageRun { block: BlockIndex(0), first: PageIndex(0), pages });
        }
        self.keep_account_of_memory();
        let mut out = Vec::new();
        setup::before_last_section(self, &mut out);
        for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
            if self.breakage.is(Breakage::SkipDiscard) {
                break;
            }
            let mut ranges = Vec::new();
            let mut from = PageIndex(0);
            while let Some(run) =
                self.pages.dirty.block(index).and_then(|dirty| dirty.next_run(from, u64::MAX))
            {
                from = PageIndex(run.end);
                let page = table.page().bytes();
                ranges.push((run.start * page, (run.end - run.start) * page));
                if ranges.len() * 16 >= DISCARDS {
                    encode_discards(block.name.as_str(), &std::mem::take(&mut ranges), &mut out);
                    self.wire.send(&std::mem::take(&mut out))?;
                }
            }
            encode_discards(block.name.as_str(), &ranges, &mut out);
        }
        Command::Ping(PING_DISCARDED).encode(&mut out);
        self.wire.send(&out)?;
        self.remove_absent();
        Ok(SourceEvent::Done)
    }

    /// The package, but for the command that starts the guest.
    pub(super) fn send_package(&mut self) -> Result<SourceEvent, Error> {
        self.check_layout()?;
        let saved = save_state(self.guest.control.as_mut());
        let mut state = saved.map_err(|source| Error::Control { what: "save its device state", source })?;
        let mut sections = Vec::new();
        match self.driver.engine.handover() {
            Handover::Native => encode_state_section(setup::RAM_SECTION_ID + 1, &state, &mut sections),
            _ if state.is_empty() => {}
            _ => {
                state.truncate(commit_at(&state, self.settings.framing));
                sections = state;
            }
        }
        let mut package = Vec::new();
        encode_package(&sections, true, &mut package);
        let size = u32::try_from(package.len()).map_err(|_| Error::Config {
            what: format!("{} bytes of device state are more than a package holds", sections.len()),
            remedy: Remedy::Advice("migrate this guest in precopy"),
        })?;
        let mut out = Vec::new();
        Command::Packaged { size }.encode(&mut out);
        out.append(&mut package);
        self.departure.commit_at = out.len() - HEAD_LEN;
        Command::Ping(PING_PACKAGED).encode(&mut out);
        self.departure.state = out;
        self.wire.send(self.departure.uncommitted())?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        self.await_discarded()?;
        Ok(SourceEvent::Done)
    }

    /// The next bytes commit. A peer that does not allow postcopy, or that failed before it was ready for missing
    /// pages, has reported that before this answer: then nothing is in doubt.
    fn await_discarded(&mut self) -> Result<(), Error> {
        let after = self.settings.stall_timeout;
        let stop = self.wire.stop.within(after);
        let silent = || Error::NoAnswer {
            what: "that it has discarded what comes again",
            after,
            remedy: Remedy::RaiseStallTimeout,
        };
        let Some(back) = &mut self.wire.back else { return Err(silent()) };
        let mut next =
            || back.next(&stop).map_err(|error| if error.is_deadline() { silent() } else { error });
        loop {
            match next()? {
                PeerMessage::Pong(PING_DISCARDED) => return Ok(()),
                PeerMessage::Working => {}
                word => refuse_verdict(word)?,
            }
            check_deadline(&stop)?;
        }
    }

    /// Sends missing pages until none is left, or until the engine calls. Requests are taken between any two batches.
    pub(super) fn send_missing(&mut self) -> Result<SourceEvent, Error> {
        self.check_layout()?;
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
            let next = self.missing.background.next(now, asked || self.missing.rest_is_asked);
            match next {
                NextMissing::Requested if asked && self.send_requested()? => {
                    if self.driver.is_called() {
                        break;
                    }
                    continue;
                }
                NextMissing::Requested | NextMissing::Background => {}
                NextMissing::Full if self.breakage.is(Breakage::FillUnbounded) => {}
                _ if self.driver.is_called() || self.pages.dirty.count() == 0 => break,
                _ if self.release_some() => continue,
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
            let seen = self.classify_missing(run, &mut batch);
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
    pub(super) fn classify_missing(&mut self, run: PageRun, batch: &mut PageBatch) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        let detection = self.settings.zero_detection.with(false);
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
        let Self { missing, wire: Wire { link, stop, .. }, .. } = self;
        if let Err(error) = missing.pages.write(&batch, link.sink(), stop) {
            self.pages.mark_unsent(&batch);
            return Err(error.into());
        }
        let bytes = self.wire.position() - before;
        self.missing.background.sent(now, batch.pages(), bytes, asked);
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
        if self.missing.behind.as_mut().is_some_and(|behind| behind.ask(run)) {
            return Ok(());
        }
        let dirty = self.pages.dirty.block(index).and_then(|dirty| dirty.next_run(run.first, 1));
        if dirty.is_some_and(|found| found.start < run.end().0) {
            self.pages.search.request(run);
        }
        Ok(())
    }

    /// Nothing is missing any more.
    pub(super) fn end_postcopy(&mut self) -> Result<SourceEvent, Error> {
        debug_assert!(self.pages.dirty.count() == 0 || self.breakage.is(Breakage::EndEarly));
        let mut out = Vec::new();
        encode_end(self.settings.ram_section, &mut out);
        out.extend_from_slice(&EOS_RECORD);
        self.settings.framing.encode_footer(self.settings.ram_section, &mut out);
        encode_eof(&mut out);
        self.wire.send(&out)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let time = self.settings.finish_timeout;
        self.wire.stop = self.driver.control.connection().stop().within(time);
        self.wire.link.sink().outlast(time.saturating_mul(2));
        self.end_urgent()?;
        let position = self.wire.position();
        self.figures.position(position);
        Ok(SourceEvent::Done)
    }
}

fn pages_of_host_page(memory: &dyn GuestMemory, block: &RamBlock) -> u64 {
    memory.table().page().pages_in(block.host_page.bytes()).max(1)
}
