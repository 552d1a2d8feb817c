//! A relay's sides after its source has switched to postcopy.
//!
//! ```text
//! source                     relay                                        far end
//! ADVISE, rounds        ->   placed, observed, sent on               ->   placed
//! DISCARD*              ->   dropped here
//! package               ->   Switched: what is not here, and what
//!                            was not sent on yet, is discarded       ->   DISCARD*, package without RUN
//!                            FarReady                                <-   PONG(2)
//!                            a guard holds the source's connection
//!                            GiveAway: RUN                           ->   loads the device state
//! pages                 ->   placed, sent on, requested ones first   ->   placed
//!                       <-   requests for what is not here           <-   REQ_PAGES
//! PONG(3), PONG(0x42)   <-   TellTaken                               <-   PONG(0x42), the guest runs
//! end                   ->   the rest, the end                       ->
//! SHUT(0)               <-   TellRunning                             <-   SHUT(0)
//! ```

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::engine::{RelayAction, RelayEvent};
use crate::error::{Chain, Remedy};
use crate::ram::{PageRun, PageSet, RamBlockTable};
use crate::session::Error;
use crate::session::destination::{Switched, ToSource};
use crate::session::source::Behind;
use crate::sys::Stop;

use super::ends::{POLL_INTERVAL, source_lost};
use super::forward::ForwardedPages;
use super::hub::{Hub, Inner};
use super::owed::{Came, Owed};

/// Interval between two checks whether the source's host has the answer that its guest was taken.
const HEARD_CHECK_INTERVAL: Duration = Duration::from_micros(200);

/// The source side: waits for what the engine decides.
pub(super) struct SwitchedSource<'a>(pub(super) &'a Hub);

impl SwitchedSource<'_> {
    /// The source's package is here: returns once the far end was given the guest.
    pub(super) fn hand_on(&self, switched: Switched) -> Result<(), Error> {
        self.0.source_has_switched(switched);
        self.await_decision(RelayAction::GiveAway)
    }

    /// The source's last page is here: returns once the far end has everything. A source that goes from here on changes
    /// nothing for the far end, unless that is in doubt.
    pub(super) fn await_end(&self) -> Result<(), Error> {
        self.await_decision(RelayAction::TellRunning)
    }

    /// The side towards the source has failed: waits until it is decided who has the guest.
    pub(super) fn settle(&self) -> Settled {
        let ends = [
            RelayAction::Unguard,
            RelayAction::TellRunning,
            RelayAction::TellFailed,
            RelayAction::TellNothing,
            RelayAction::Part,
        ];
        loop {
            let inner = self.0.wait(POLL_INTERVAL, |inner| ends.iter().any(|end| inner.has(*end)));
            match () {
                () if inner.has(RelayAction::TellNothing) => return Settled::Nothing,
                () if ends.iter().any(|end| inner.has(*end)) => return Settled::Known,
                () => drop(inner),
            }
            if self.0.source_is_gone() {
                self.0.post(RelayEvent::SourceGone);
            }
        }
    }

    fn await_decision(&self, go: RelayAction) -> Result<(), Error> {
        loop {
            let inner = self.0.wait(POLL_INTERVAL, |inner| inner.has(go) || why_ended(inner).is_some());
            match why_ended(&inner) {
                // What was decided first counts.
                _ if inner.has(go) => return Ok(()),
                Some(why) => return Err(why),
                None => {}
            }
            // Until the far end was given the guest, a source that has gone keeps it.
            let looks = inner.engine.is_in_doubt() || go == RelayAction::GiveAway;
            drop(inner);
            if looks && self.0.source_is_gone() {
                self.0.post(RelayEvent::SourceGone);
            }
        }
    }
}

/// What a failed side towards the source may say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// Who has the guest, as decided.
    Known,
    /// Nothing.
    Nothing,
}

/// Why nothing more is read from a source that has switched; `None` while it is.
pub(super) fn why_ended(inner: &Inner) -> Option<Error> {
    if !inner.engine.has_switched() {
        return None;
    }
    let failed = |why: String| Some(Error::PeerFailed { why });
    let why = inner.why();
    match () {
        () if inner.has(RelayAction::TellFailed) => failed(format!("the far end did not take it: {why}")),
        () if inner.has(RelayAction::TellNothing) => {
            failed(format!("the far end was given the guest, and it is not known whether it has it: {why}"))
        }
        () if inner.has(RelayAction::Part) => failed(format!(
            "the guest runs at the far end, and a connection was lost while pages were missing there: {why}"
        )),
        () => None,
    }
}

/// The far side: pages that its source still owes, and messages to that source.
pub(super) struct FarSwitch {
    hub: Arc<Hub>,
    arrivals: Arc<ForwardedPages>,
    owed: Owed,
    source: Option<Arc<ToSource>>,
    /// The source was told that its guest was taken, and is not known to know.
    unheard: bool,
    /// When the far end was given the guest, about.
    given: Option<Instant>,
    finish_timeout: Duration,
    silent: bool,
}

impl FarSwitch {
    /// The source has switched. `None` if that was taken already.
    pub(super) fn begin(
        hub: &Arc<Hub>,
        arrivals: &Arc<ForwardedPages>,
        table: &RamBlockTable,
        finish_timeout: Duration,
    ) -> Option<Self> {
        let Switched { owed, source, .. } = hub.take_switch()?;
        Some(Self {
            hub: Arc::clone(hub),
            arrivals: Arc::clone(arrivals),
            owed: Owed::new(table, owed),
            source: source.map(Arc::new),
            unheard: false,
            given: None,
            finish_timeout,
            silent: false,
        })
    }

    /// Looks whether the source has the answer that its guest was taken.
    fn hear(&mut self) {
        if self.unheard && self.hub.source_knows() {
            self.unheard = false;
            self.hub.post(RelayEvent::SourceKnows);
        }
    }
}

impl Behind for FarSwitch {
    fn absent(&self) -> &PageSet {
        self.owed.absent()
    }

    fn left(&self) -> u64 {
        self.owed.left()
    }

    fn came(&mut self) -> Vec<Came> {
        self.hear();
        let runs = self.arrivals.take_queue();
        runs.into_iter().flat_map(|run| self.owed.came(run)).collect()
    }

    fn ask(&mut self, run: PageRun) -> bool {
        let Some(due) = self.owed.ask(run) else { return false };
        let Some(source) = &self.source else { return true };
        if let Err(error) = due.into_iter().try_for_each(|page| source.ask(page)) {
            // The side towards the source notices the same, and ends the relay.
            tracing::warn!(error = %Chain(&error), "a missing page could not be asked for");
        }
        true
    }

    fn taken(&mut self) {
        self.hub.post(RelayEvent::FarTook);
        let Some(source) = &self.source else { return };
        if !self.hub.lock().has(RelayAction::TellTaken) {
            return;
        }
        if let Err(error) = source.taken() {
            tracing::warn!(error = %Chain(&error), "the source can't be told that its guest was taken");
            return;
        }
        self.hub.source_is_told(Arc::clone(source));
        self.unheard = true;
        // Pages that it still has would come no sooner.
        let stop = Stop::never().within(self.finish_timeout);
        while self.unheard {
            self.hear();
            let over = self.hub.source_is_gone() || self.hub.lock().has(RelayAction::Abandon);
            if over || stop.sleep(HEARD_CHECK_INTERVAL).is_some() || stop.reason().is_some() {
                return;
            }
        }
    }

    fn why_ended(&self) -> Option<Error> {
        let inner = self.hub.lock();
        let over = inner.has(RelayAction::Abandon);
        over.then(|| why_ended(&inner).unwrap_or_else(source_lost))
    }

    fn wake(&self) -> Option<BorrowedFd<'_>> {
        self.arrivals.wake()
    }

    fn check(&mut self, taken: bool) -> Result<(), Error> {
        if let Some(why) = self.why_ended() {
            return Err(why);
        }
        // The far end was given the guest by now.
        let late = self.given.get_or_insert_with(Instant::now).elapsed() >= self.finish_timeout;
        if !taken && late && !std::mem::replace(&mut self.silent, true) {
            self.hub.because(&Error::NoAnswer {
                what: "that it takes the guest",
                after: self.finish_timeout,
                remedy: Remedy::RaiseFinishTimeout,
            });
            self.hub.post(RelayEvent::FarSilent);
        }
        Ok(())
    }
}
