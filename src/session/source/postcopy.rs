//! Postcopy at the source: the dirty pages are discarded, and the guest is handed over in a package. Its missing pages
//! follow ([`filling`](super::filling)).
//!
//! # Orders that must hold
//!
//! The dirty pages are discarded before RUN, which is the last command of the package and commits. The end is sent when
//! no page is dirty and the peer has taken the guest, behind all that page channels carry.

use std::sync::Arc;

use crate::engine::{Handover, SourceEvent};
use crate::error::Remedy;
use crate::guest::{GuestMemory, save_state};
use crate::page::PageSearch;
use crate::ram::{PageRun, RamBlock};
use crate::stream::native::encode_state_section;
use crate::stream::qemu::command::{Command, HEAD_LEN, encode_discards};
use crate::stream::qemu::package::encode_package;
use crate::stream::qemu::ram::EOS_RECORD;
use crate::stream::qemu::section::{encode_end, encode_eof};
use crate::units::{BlockIndex, PageIndex};

use super::SourceSession;
use super::handover::commit_at;
use super::peer::refuse_verdict;
use super::return_path::{PeerMessage, check_deadline};
use super::setup;
use super::urgent;
use crate::session::config::{SourceSettings, Verify};
use crate::session::{Breakage, Error};

/// Bytes of discards that leave together.
const DISCARDS: usize = 64 << 10;
/// PING before the package, and after it.
const PING_DISCARDED: u32 = 2;
pub(super) const PING_PACKAGED: u32 = 4;

/// Host page sizes of the migrated blocks, ORed, in bytes: what both ends of a postcopy must have in common.
pub(super) fn host_pages(blocks: &[RamBlock]) -> u64 {
    let travels = blocks.iter().filter(|block| !block.flags.ignored);
    travels.fold(0, |all, block| all | block.host_page.bytes())
}

/// A switch can't be made where nobody answers.
pub(super) fn no_answers_for_postcopy() -> Error {
    Error::Config {
        what: "postcopy was asked for, and the connection carries no answers".into(),
        remedy: Remedy::Advice("migrate over a connection of both directions (tcp:, unix:)"),
    }
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
                "a switch was not announced to the destination",
                "set SourceSettings::postcopy, or let the timeout cancel or finish",
            ),
            () if !asked => Ok(()),
            () if self.wire.back.is_none() => Err(no_answers_for_postcopy()),
            () if urgent::time_of(&self.settings).is_some() && !self.missing.recovery.can_connect() => {
                refused(
                    "it is not known how to make the connection for urgent pages",
                    "set it (SourceSession::with_reconnect), or let urgent pages go with the others",
                )
            }
            () if self.settings.verify == Verify::Full => {
                refused("a digest can't be compared while pages are missing", "ask for one of them")
            }
            () if self.settings.verify == Verify::Fast => refused(
                "fingerprints are compared before the guest is handed over, and pages would be missing then",
                "ask for one of them",
            ),
            () if self.wire.link.abilities().registers_memory && !self.wire.link.abilities().serves_reads => {
                refused(
                    "its pages are placed by a NIC: missing ones can only be read by a ramwire of this version, over devices \
                     that do RDMA READs",
                    "set RdmaOptions::postcopy towards a ramwire; use a tcp: or unix: address otherwise",
                )
            }
            () if self.upstream.is_some() && self.wire.link.abilities().serves_reads => {
                refused("a relay lets nobody read its memory", "use a tcp: or unix: address")
            }
            () if self.wire.link.abilities().serves_reads && self.settings.reads_have_no_effect() => refused(
                "over RDMA the destination reads the missing pages itself, at its own rate and urgent ones first",
                "leave the limit of their rate and the connection for urgent pages out",
            ),
            () if self.upstream.is_some() && self.wire.link.page_channels() > 0 => refused(
                "a relay's missing pages travel in the stream only",
                "use a tcp: or unix: address, without page channels",
            ),
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
        self.begin_serving()?;
        self.track_releases();
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

    /// Nothing is missing any more.
    pub(super) fn end_postcopy(&mut self) -> Result<SourceEvent, Error> {
        debug_assert!(self.pages.dirty.count() == 0 || self.breakage.is(Breakage::EndEarly));
        self.gather_spread()?;
        let mut out = Vec::new();
        encode_end(self.settings.ram_section, &mut out);
        out.extend_from_slice(&EOS_RECORD);
        self.settings.framing.encode_footer(self.settings.ram_section, &mut out);
        encode_eof(&mut out);
        self.wire.send(&out)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let time = self.settings.finish_timeout;
        self.wire.stop = self.driver.control.connection().stop().within(time);
        self.wire.link.sink().tolerate_outage(time.saturating_mul(2));
        self.end_urgent()?;
        let position = self.wire.position();
        self.figures.position(position);
        Ok(SourceEvent::Done)
    }
}

impl SourceSettings {
    /// True for settings about missing pages that are sent.
    fn reads_have_no_effect(&self) -> bool {
        self.postcopy.as_ref().is_some_and(|postcopy| postcopy.preempt || postcopy.max_bandwidth.is_some())
    }
}

pub(super) fn pages_of_host_page(memory: &dyn GuestMemory, block: &RamBlock) -> u64 {
    memory.table().page().pages_in(block.host_page.bytes()).max(1)
}
