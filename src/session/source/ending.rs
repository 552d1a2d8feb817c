//! How a migration ends at the source: a cancel that comes too late, the way back before COMMIT, the report.

use std::time::Duration;

use crate::engine::{Outcome, SourceEvent};
use crate::error::Chain;
use crate::observe::Statistics;
use crate::ram::{BlockName, DirtyMap};
use crate::sys::Stop;

use super::SourceSession;
use crate::session::callback::{guarded, quietly};
use crate::session::{Breakage, Error, MemoryCheck};

/// How a migration ended, as the source knows it.
#[derive(Debug)]
#[non_exhaustive]
pub struct SourceReport {
    /// The owner of the guest.
    pub outcome: Outcome,
    /// Why it is not the destination, or why it is not known who has the guest.
    pub error: Option<Error>,
    /// The figures.
    pub statistics: Statistics,
    /// When the first page had been handed to the connection, since the start.
    pub first_page_sent: Option<Duration>,
    /// Pages the destination does not have for certain; all clean after success.
    pub dirty: DirtyMap,
    /// Pages that left on the connection for urgent ones
    /// ([`PostcopySettings::preempt`](crate::session::PostcopySettings::preempt)).
    pub urgent_pages: u64,
    /// The result of the memory check once the guest ran at the destination; `None` if it was not made
    /// ([`Verify::Fast`](crate::session::Verify::Fast)).
    pub memory_check: Option<MemoryCheck>,
    /// Pages whose memory was given back ([`PostcopySettings::release_ram`](crate::session::PostcopySettings::release_ram)).
    pub released_pages: u64,
    /// The guest was paused here and not resumed: it is at the destination, or in doubt, or could not resume.
    pub not_resumed: bool,
    /// Blocks whose memory was passed to the destination; none unless it may have the guest. Nothing here may write to
    /// them, or take pages from their files, unless an operator has decided that the guest continues here.
    pub passed: Vec<BlockName>,
}

impl SourceReport {
    /// True if the guest continues, whole, at the source.
    pub fn guest_is_safe_here(&self) -> bool {
        matches!(self.outcome, Outcome::StaysHere(_)) && !self.not_resumed
    }
}

impl SourceSession {
    /// After COMMIT a cancel breaks no wait any more.
    pub(super) fn refuse_cancel(&mut self) {
        if self.wire.stop.reason().is_some() && !self.breakage.is(Breakage::BreakOffAfterCommit) {
            self.wire.stop = Stop::never();
        }
        tracing::warn!("cancel refused: the destination owns the guest");
    }

    pub(super) fn report(mut self, outcome: Outcome) -> SourceReport {
        let now = self.driver.clock.now();
        self.driver.control.connection().over();
        let given_away = matches!(outcome, Outcome::InDoubt | Outcome::Incomplete);
        if given_away && let Err(error) = self.stop_logs() {
            // The guest is paused: a log left on costs time, and loses nothing.
            tracing::warn!(error = %Chain(&error), "a dirty log could not be stopped");
        }
        let position = self.wire.position();
        self.figures.position(position);
        self.note_ways_of_sending();
        if given_away {
            self.end_throttling();
        }
        self.note_overdue();
        quietly("reporting the end", || self.figures.ended(now, outcome, self.error.as_ref()));
        self.let_go(outcome);
        quietly("telling the destination that the guest stays here", || self.tell_given_up(outcome));
        if self.error.is_none() && matches!(outcome, Outcome::StaysHere(_)) {
            self.error = Some(Error::Cancelled);
        }
        quietly("reporting the end", || self.figures.shared().cleaned_up());
        let statistics = self.figures.shared().snapshot();
        let first_page_sent = self.figures.first_page();
        let (dirty, memory_check) = (self.pages.dirty, self.pages.prints.found);
        let not_resumed = self.departure.paused;
        SourceReport {
            outcome,
            error: self.error,
            statistics,
            first_page_sent,
            dirty,
            urgent_pages: self.missing.urgent_pages,
            memory_check,
            released_pages: self.missing.released_pages(),
            not_resumed,
            passed: self.departure.passed.into_blocks(),
        }
    }

    /// How pages left, where there is a choice; before the link goes.
    pub(super) fn note_ways_of_sending(&mut self) {
        if let Some(counts) = self.wire.link.zero_copy() {
            self.figures.zero_copy(Some(counts));
        }
        if let Some(counts) = self.wire.link.spliced() {
            self.figures.spliced(Some(counts));
        }
    }

    /// The connection ends, then the guest may give pages back again.
    fn let_go(&mut self, outcome: Outcome) {
        if outcome == Outcome::Completed {
            let stop = Stop::never().within(self.settings.finish_timeout);
            if let Err(error) = self.wire.link.close(&stop) {
                tracing::warn!(error = %Chain(&error), "the migration is complete, but its connection did not end in good order");
            }
        }
        if self.wire.link.abilities().registers_memory {
            drop(self.wire.link.reclaim());
            quietly("allowing discards", || _ = self.guest.control.forbid_discard(false));
        }
    }

    /// Before COMMIT: nothing is lost. Unsent and unconfirmed pages are dirty again, the guest runs.
    pub(super) fn roll_back(&mut self) -> Result<SourceEvent, Error> {
        self.note_overdue();
        self.wire.stop = Stop::never();
        let confirms = self.wire.link.abilities().confirms_placement;
        self.take_memory_back();
        let given_back = guarded("taking pages back", || self.wire.link.reclaim());
        if given_back.is_err() {
            self.pages.mark_all_unsent();
        }
        if !self.breakage.is(Breakage::ForgetUnsent) {
            let table = self.guest.memory.table();
            self.pages.give_back(given_back.unwrap_or_default(), confirms, table);
        }
        self.pages.skip_no_more(self.breakage);
        let leave_on = self.breakage.is(Breakage::LeaveLogsOn);
        let stopped = if leave_on { Ok(SourceEvent::Done) } else { self.stop_logs() };
        if !self.breakage.is(Breakage::LeaveThrottleOn) {
            self.end_throttling();
        }
        if self.departure.paused && !self.breakage.is(Breakage::StayPaused) {
            let resumed = guarded("calling GuestControl::resume", || self.guest.control.resume());
            let resumed = resumed.unwrap_or_else(|panic| Err(std::io::Error::other(panic)));
            if let Err(source) = resumed {
                // More urgent than the first error: the operator must look after the guest.
                let why =
                    self.error.take().map_or_else(|| "cancelled".into(), |error| Chain(&error).to_string());
                return Err(Error::NotResumed { why, source });
            }
            self.departure.paused = false;
        }
        stopped
    }
}
