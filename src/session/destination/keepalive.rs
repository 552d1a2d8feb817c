//! A destination that is at work says so.
//!
//! What stands between the last byte and READY takes its time: a digest of all RAM, a guest's state, a folder's
//! `fsync`, a relay's far end. The source takes long silence for a dead peer, and can't be asked to wait for hours just
//! in case.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, bounded};

use crate::error::Chain;
use crate::stream::native::Answer;
use crate::stream::qemu::return_path::Message;
use crate::sys::{Lock as _, SendPart, Stop};

use super::DestinationSession;

/// Longest time in which a destination that is at work is silent.
pub(super) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);

impl DestinationSession {
    /// Does `work`; meanwhile a thread tells a ramwire source that we are at it.
    pub(super) fn with_keepalive<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> T {
        let tells = self.engine.is_native() && self.told.return_path;
        let Some(back) = self.back.take_if(|_| tells) else { return work(self) };
        let back = Arc::new(Mutex::new(Some(back)));
        let (done, until_done) = bounded::<()>(0);
        let (every, patience) = (self.keepalive_interval, self.settings.stall_timeout);
        let shared = Arc::clone(&back);
        let say = move || {
            let mut word = Vec::new();
            Message::Native(Answer::Working).encode(&mut word);
            while until_done.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let stop = Stop::never().within(patience);
                let mut back = shared.locked();
                let Some(back) = &mut *back else { return };
                let said = back.send(&[SendPart::Own(&word)], &stop).and_then(|()| back.flush(&stop));
                if let Err(error) = said {
                    // The next word of the session itself meets the same, and ends the migration.
                    tracing::warn!(error = %Chain(&error), "the source can't be told that we are at it");
                    return;
                }
            }
        };
        let thread = self.settings.spawner.spawn("ramwire-working", Box::new(say));
        if let Err(error) = &thread {
            tracing::warn!(%error, "the source is not told that we are at it; it may take us for dead");
        }
        let done_work = catch_unwind(AssertUnwindSafe(|| work(self)));
        drop(done);
        // The thread finds nothing to speak with from here on. Its end is not waited for: it may not even have begun,
        // and the guest stands still.
        self.back = back.locked().take();
        self.working.extend(thread.ok());
        // The way back is ours again: the source can be told.
        done_work.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Waits for the threads of [`at_work`](Self::at_work): nothing of a session is left when it has ended.
    pub(super) fn join_working(&mut self) {
        for thread in self.working.drain(..) {
            // A panic in the embedder's spawner has told itself.
            let _ = thread.join();
        }
    }
}
