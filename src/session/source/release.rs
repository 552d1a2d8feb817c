//! Memory that is given back after a switch to postcopy. The engine decides which pages ([`Release`]).

use std::sync::Arc;

use crate::engine::Release;
use crate::error::Chain;
use crate::ram::DirtyMap;
use crate::session::callback::guarded;
use crate::session::{Breakage, Error};

use super::SourceSession;
use super::filling::Missing;

impl Missing {
    pub(super) fn released_pages(&self) -> u64 {
        self.release.as_ref().map_or(0, Release::count)
    }
}

impl SourceSession {
    /// The pages that are dirty now are sent after the switch. All others are at the destination.
    pub(super) fn track_releases(&mut self) {
        if self.settings.postcopy.as_ref().is_some_and(|postcopy| postcopy.release_ram) {
            let mut release = Release::new(self.guest.memory.table());
            // Memory that the destination reads stays where it is, also between pages that it lacks.
            if self.missing.served.is_none() {
                release.confirm_clean(&self.pages.dirty);
            }
            self.missing.release = Some(release);
        }
    }

    /// After a lost connection the destination reports that it lacks the pages in `dirty` and has all others.
    ///
    /// # Errors
    /// It lacks pages that it had, and that are no longer here.
    pub(super) fn confirm_received(&mut self, dirty: &DirtyMap) -> Result<(), Error> {
        let Some(release) = &mut self.missing.release else { return Ok(()) };
        if let Some(lost) = release.lost(dirty) {
            let table = self.guest.memory.table();
            let name = table.get(lost.block).map_or("", |block| block.name.as_str());
            let at = lost.first.0 * table.page().bytes();
            return Err(Error::OutOfTurn {
                what: format!(
                    "a bitmap without the page at {at:#x} of RAM block {name}, which it had received,"
                ),
                at: None,
                while_doing: "its memory was given back here",
            });
        }
        release.confirm_clean(dirty);
        Ok(())
    }

    /// Gives some memory back that the destination has; false if there is none.
    pub(super) fn release_some(&mut self) -> bool {
        let memory = Arc::clone(&self.guest.memory);
        let taken = self.driver.engine.is_taken() || self.breakage.is(Breakage::ReleaseUntaken);
        let Some(release) = self.missing.release.as_mut().filter(|_| taken) else { return false };
        release.taken();
        let Some(run) = release.next() else { return false };
        let Ok(landing) = memory.table().admit_run(run) else { return false };
        match guarded("calling GuestMemory::discard", || memory.discard(landing)) {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => tracing::warn!(error = %Chain(&error), "the guest's memory is not given back"),
            Err(error) => tracing::warn!(error = %Chain(&error), "the guest's memory is not given back"),
        }
        release.stop();
        false
    }

    /// The guest runs at the destination, whole.
    pub(super) fn release_all(&mut self) {
        debug_assert!(self.missing.served.as_ref().is_none_or(|served| !served.has_keys_out()));
        let Some(release) = self.missing.release.as_mut() else { return };
        release.confirm_clean(&self.pages.dirty);
        while self.release_some() {}
    }
}
