//! What a relay does with pages that arrive, and with a source that switches to postcopy.

use std::sync::Arc;
use std::time::Duration;

use super::provider::Incoming;
use super::receive::out_of_turn;
use super::relayed::Switched;
use crate::guest::{GuestMemory, PageObserver};
use crate::session::Error;
use crate::sys::CancelToken;

/// Sees pages as they arrive; a relay's.
pub(crate) trait IncomingObserver: Send {
    /// The early sections have arrived and pages are next. Called again before each section of pages, which have this
    /// id.
    ///
    /// # Errors
    /// Ends the migration.
    fn began(
        &mut self,
        incoming: &Incoming,
        memory: &Arc<dyn GuestMemory>,
        section: u32,
    ) -> Result<(), Error>;

    /// The memory exists and no page has arrived yet: returns the observer of each page, called by the thread that
    /// places it.
    fn watch(&mut self, memory: &Arc<dyn GuestMemory>) -> Arc<dyn PageObserver>;

    /// Called between reads; may wait to hand pressure back to the source.
    ///
    /// # Errors
    /// Ends the migration.
    fn between_reads(&mut self) -> Result<(), Error>;

    /// The last page has arrived: the source's guest is paused. `scan` is the time taken to find the last pages by
    /// their content, if they arrived by a link that reports none.
    ///
    /// # Errors
    /// Ends the migration.
    fn ram_complete(&mut self, scan: Option<Duration>) -> Result<(), Error>;

    /// True if the guest of a source that switches to postcopy runs elsewhere, at the far end of a relay.
    ///
    /// # Errors
    /// Such a source is refused.
    fn relays_postcopy(&self) -> Result<bool, Error> {
        Ok(false)
    }

    /// The source has switched to postcopy: returns once the far end was given the guest.
    ///
    /// # Errors
    /// It was not, and the guest does not run there.
    fn switched(&mut self, _switched: Switched) -> Result<(), Error> {
        Err(out_of_turn("a package", "a migration without ADVISE"))
    }

    /// After the switch: raised when nothing more is read from the source.
    fn source_ends(&self) -> CancelToken {
        CancelToken::default()
    }

    /// After the switch: the last page has arrived. Returns once the far end has everything.
    ///
    /// # Errors
    /// It has not: its connection was lost.
    fn all_came(&mut self) -> Result<(), Error> {
        Ok(())
    }

    /// After the switch: a step or the connection has failed. Returns when it is decided who has the guest, and the
    /// source knows if it is the far end: until then the connection must not close, nor a failure be reported.
    fn settle(&self) {}

    /// After the switch: true while the source may have sent everything, and waits for an answer.
    fn source_may_be_silent(&self) -> bool {
        false
    }

    /// After the switch: true once the guest runs at the far end, so that a loss gives it to nobody else.
    fn is_taken(&self) -> bool {
        false
    }

    /// After the switch: true once the far end has reported that it has everything, which the source is to be told.
    fn has_moved(&self) -> bool {
        false
    }

    /// After the switch: why the relay has ended it, if it has.
    fn why_ended(&self) -> Option<Error> {
        None
    }
}
