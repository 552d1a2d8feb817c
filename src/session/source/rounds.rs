//! Dirty logs, syncs, and the beginning and end of each round.

use std::sync::Arc;
use std::time::Instant;

use crate::engine::{Sent, SourceEvent};
use crate::error::Remedy;
use crate::guest::{DirtySource, sync_all};
use crate::observe::{EventKind, Status};
use crate::ram::RoundKind;
use crate::stream::qemu::{ram, section};

use super::{SourceSession, discards, setup};
use crate::session::callback::{guarded, named};
use crate::session::{Breakage, Error};

impl SourceSession {
    pub(super) fn start_logs(&mut self) -> Result<SourceEvent, Error> {
        self.figures.shared().update(|s| s.status = Status::Setup);
        if self.guest.dirty.is_empty() && !self.settings.guest_is_paused {
            return Err(Error::Config {
                what: "no dirty source: what the guest writes while its pages travel would be lost".into(),
                remedy: Remedy::Advice(
                    "give a source for each of its writers, or report that it is paused (guest_is_paused)",
                ),
            });
        }
        self.refuse_unsupported()?;
        self.refuse_postcopy()?;
        self.refuse_passing()?;
        let registers =
            self.wire.link.abilities().registers_memory && !self.breakage.is(Breakage::RegisterUnpromised);
        if registers && !self.guest.control.forbid_discard(true) {
            return Err(discards());
        }
        let counts_vcpus = !self.guest.control.vcpu_dirty_pages().is_empty();
        self.driver.control.guest_counts_vcpus(counts_vcpus)?;
        // First: should a log not start, nothing is at the destination.
        if self.settings.all_dirty_at_start {
            self.pages.dirty.set_all(self.guest.memory.table());
        }
        self.leave_out_passed_ahead()?;
        self.pages.skip_at_start(self.guest.memory.table(), self.breakage);
        for source in &self.guest.dirty {
            named("calling DirtySource::start", || source.start())?;
        }
        Ok(SourceEvent::Done)
    }

    pub(super) fn stop_logs(&mut self) -> Result<SourceEvent, Error> {
        let stop =
            |source: &Arc<dyn DirtySource>| Ok(guarded("calling DirtySource::stop", || source.stop())??);
        // Every source is stopped, even if an earlier one refuses.
        let results: Vec<Result<(), Error>> = self.guest.dirty.iter().map(stop).collect();
        results.into_iter().collect::<Result<(), _>>()?;
        Ok(SourceEvent::Done)
    }

    pub(super) fn sync(&mut self, last: bool) -> Result<SourceEvent, Error> {
        let began = self.driver.clock.now();
        self.check_layout()?;
        self.pages.skip_before_sync(self.breakage);
        self.figures.shared().tell(EventKind::SyncBegins { last });
        let fresh = sync_all(&self.guest.dirty, self.guest.memory.table(), &mut self.pages.dirty)?;
        if last && self.breakage.is(Breakage::LoseDirtyBit) {
            let _lost = self.pages.search.next_run(&mut self.pages.dirty, 1);
        }
        self.pages.skip_after_sync(self.guest.memory.table(), last, self.breakage);
        let (hinted, discarded) = self.pages.skips.counts();
        self.figures.skipped(hinted, discarded);
        let dirty_pages = self.pages.dirty.count();
        let now = self.driver.clock.now();
        self.convergence.fixed.sync = now.saturating_sub(began);
        if !last {
            self.follow_control();
            self.throttle(fresh);
            self.estimate_fixed();
        }
        let expected = self.driver.engine.expected_downtime(dirty_pages);
        self.figures.synced(now, dirty_pages, fresh, expected);
        self.figures.shared().tell(EventKind::Synced { dirty_pages, last });
        Ok(SourceEvent::Synced { dirty_pages })
    }

    pub(super) fn open_round(&mut self, kind: RoundKind, number: u32) -> Result<SourceEvent, Error> {
        self.figures.round(self.driver.clock.now(), number, self.pages.dirty.count());
        self.check_progress();
        self.begin_section(kind)?;
        Ok(SourceEvent::Done)
    }

    fn begin_section(&mut self, kind: RoundKind) -> Result<(), Error> {
        let mut head = Vec::new();
        if kind == RoundKind::Final {
            setup::before_last_section(self, &mut head);
            section::encode_end(self.settings.ram_section, &mut head);
        } else {
            section::encode_part(self.settings.ram_section, &mut head);
        }
        self.wire.send(&head)?;
        Ok(self.wire.link.open_round(kind, &self.wire.stop)?)
    }

    pub(super) fn close_round(&mut self, kind: RoundKind) -> Result<SourceEvent, Error> {
        let (begun, before, guest_before) =
            (Instant::now(), self.wire.position(), self.figures.whole_bytes());
        self.end_section(kind)?;
        self.figures.fenced(begun.elapsed());
        self.take_returned()?;
        let mut writes = Vec::new();
        self.wire.link.take_latencies(&mut writes);
        self.figures.written(&writes);
        self.figures.deltas(self.wire.deltas());
        self.figures.channel_bytes(self.wire.channel_bytes());
        self.send_fingerprints()?;
        self.send_fence()?;
        let sent = self.wire.position();
        let guest = self.figures.whole_bytes() - guest_before;
        self.driver.engine.set_sent_at_fence(Sent { guest, wire: sent - before });
        self.driver.engine.set_unacknowledged(self.wire.link.unacknowledged());
        self.figures.round_closed(self.driver.clock.now(), sent);
        self.await_compared(kind)?;
        Ok(SourceEvent::Done)
    }

    /// All pages of the open section have left or, over RDMA, were written, and the section ends.
    fn end_section(&mut self, kind: RoundKind) -> Result<(), Error> {
        if !self.breakage.is(Breakage::SkipFence) {
            self.wire.link.close_round(kind, &self.wire.stop)?;
        }
        self.send_declined()?;
        let mut tail = ram::EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(self.settings.ram_section, &mut tail);
        self.wire.send(&tail)?;
        Ok(self.wire.link.sink().flush(&self.wire.stop)?)
    }

    /// Where only a fence tells what has come, a loss costs what was sent since the last one: in a long round, one is sent
    /// from time to time. The section ends for it, and another begins; for the engine it is one round.
    pub(super) fn fence_within_round(&mut self) -> Result<(), Error> {
        let beside = self.wire.link.abilities().registers_memory && !self.driver.engine.is_last_round();
        let Some(unconfirmed) = self.pages.unconfirmed.as_ref().filter(|_| beside) else { return Ok(()) };
        if !unconfirmed.is_fence_due(self.driver.clock.now()) {
            return Ok(());
        }
        self.end_section(RoundKind::Live)?;
        self.take_returned()?;
        self.send_fingerprints()?;
        self.send_fence()?;
        tracing::debug!("a fence within a round");
        self.begin_section(RoundKind::Live)
    }
}
