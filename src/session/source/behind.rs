//! Postcopy at the far side of a relay: some pages are not here yet, since the guest's own source still has them.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::ram::{PageRun, PageSet};
use crate::session::Error;
use crate::session::relay::Came;

use super::SourceSession;

/// Between two looks where there is no descriptor to wait for.
const SHORT_WAIT: Duration = Duration::from_millis(1);

/// The guest's own source after its switch to postcopy, behind a relay.
pub(in crate::session) trait Behind: Send {
    /// Pages that are not here: what is in memory is older.
    fn absent(&self) -> &PageSet;

    /// Number of pages that are not here.
    fn left(&self) -> u64;

    /// Pages that have come since the last call and may be sent on.
    fn came(&mut self) -> Vec<Came>;

    /// A thread at the peer waits for `run`: requests what is not here, and returns true; false if all of it is here.
    fn ask(&mut self, run: PageRun) -> bool;

    /// The peer has taken the guest.
    fn taken(&mut self);

    /// Why nothing more is sent on, if so: the guest's source is gone, or the relay gave up.
    fn why_ended(&self) -> Option<Error>;

    /// Readable while [`came`](Self::came) has something.
    fn wake(&self) -> Option<BorrowedFd<'_>>;

    /// Called while the peer has all that is here. `taken`: it has taken the guest.
    ///
    /// # Errors
    /// The guest's source is gone.
    fn check(&mut self, taken: bool) -> Result<(), Error>;
}

impl SourceSession {
    /// What the guest's own source has discarded is discarded at the peer as well.
    pub(super) fn add_absent(&mut self) {
        let Some(behind) = &self.missing.behind else { return };
        behind.absent().runs().for_each(|run| _ = self.pages.dirty.set_run(run));
    }

    /// The discards have left: only pages that are here may be sent.
    pub(super) fn remove_absent(&mut self) {
        let Some(behind) = &self.missing.behind else { return };
        behind.absent().runs().for_each(|run| _ = self.pages.dirty.clear_run(run));
    }

    /// Pages that have come are sent on, requested ones first.
    pub(super) fn take_what_came(&mut self) {
        let Some(behind) = &mut self.missing.behind else { return };
        for Came { run, asked } in behind.came() {
            self.pages.dirty.set_run(run);
            if asked {
                self.pages.search.request(run);
            }
        }
    }

    /// Pages that the peer does not have: those that are here, and those that are not.
    pub(super) fn pages_missing(&self) -> u64 {
        self.pages.dirty.count() + self.missing.behind.as_ref().map_or(0, |behind| behind.left())
    }

    /// At a relay whose peer was given the guest: why the relay ends the connection, if it does.
    pub(super) fn why_parted(&self) -> Option<Error> {
        let behind = self.missing.behind.as_ref().filter(|_| self.driver.engine.is_committed());
        behind.and_then(|behind| behind.why_ended())
    }

    /// True while there is nothing to send, and something to wait for: pages, or the peer's word.
    pub(super) fn awaits_more(&self) -> bool {
        let behind = self.missing.behind.as_ref();
        self.pages.dirty.count() == 0
            && behind.is_some_and(|behind| behind.left() > 0 || !self.driver.engine.is_taken())
    }

    /// Waits for a page, or for a message of the peer, at most until the engine calls.
    pub(super) fn await_more(&mut self) -> Result<(), Error> {
        let left = self.time_left().unwrap_or_default();
        let taken = self.driver.engine.is_taken();
        let Some(behind) = &mut self.missing.behind else { return Ok(()) };
        behind.check(taken)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let stop = self.wire.stop.within(left);
        let peer = self.wire.back.as_ref().and_then(|back| back.descriptor());
        let fds: Vec<_> = [peer, behind.wake()].into_iter().flatten().collect();
        let waited = if fds.len() == 2 {
            stop.wait_any(&fds)
        } else {
            // One of them can't be waited for.
            stop.sleep(SHORT_WAIT);
            Ok(None)
        };
        waited.map_err(|source| Error::Control { what: "wait for pages", source })?;
        match self.wire.stop.reason() {
            Some(_) => Err(Error::Cancelled),
            None => Ok(()),
        }
    }
}
