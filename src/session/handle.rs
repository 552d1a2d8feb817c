//! A migration on a thread of its own, in the hand of an embedder: how far it is, cancel, and its report.
//!
//! # Order that must hold
//!
//! A cancel and COMMIT are decided under one lock. After an accepted cancel the guest stays
//! where it is; a cancel that comes too late changes nothing.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, TryRecvError, bounded};

use crate::observe::{Events, SharedStatistics, Statistics};
use crate::sys::{CancelToken, Lock as _};

use crate::session::control::Control;
use crate::session::workers::Spawner;
use crate::session::{DestinationReport, DestinationSession, Error, SourceReport, SourceSession};

/// Whether the guest has been given away, as a cancel may ask it.
#[derive(Debug, Default)]
struct Commitment(Mutex<bool>);

impl Commitment {
    /// Runs one `step` of an engine, which tells whether it is committed afterwards.
    fn decide<T>(&self, step: impl FnOnce() -> (T, bool)) -> T {
        let mut committed = self.0.locked();
        let (answer, now) = step();
        *committed = now;
        answer
    }

    fn cancel(&self, token: &CancelToken) -> CancelReply {
        let committed = self.0.locked();
        if *committed {
            return CancelReply::TooLate;
        }
        token.cancel();
        CancelReply::Accepted
    }
}

/// Asks a migration for its end, from any thread; clones ask the same one.
#[derive(Clone, Debug, Default)]
pub struct Canceller {
    commitment: Arc<Commitment>,
    cancel: CancelToken,
}

impl Canceller {
    /// Asks for the end. Never blocks for long; the answer is final.
    pub fn cancel(&self) -> CancelReply {
        self.commitment.cancel(&self.cancel)
    }

    /// Of a token that the caller has already.
    pub(super) fn over(cancel: CancelToken) -> Self {
        Self { commitment: Arc::default(), cancel }
    }

    /// What wakes the waits.
    pub(super) fn token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Runs one `step` of an engine, which tells whether it is committed afterwards. No cancel comes in between.
    pub(super) fn decide<T>(&self, step: impl FnOnce() -> (T, bool)) -> T {
        self.commitment.decide(step)
    }
}

/// What becomes of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a cancel that came too late changes nothing: the guest goes to the destination"]
pub enum CancelReply {
    /// The guest stays at the source: a source resumes it, a destination discards what came. The report
    /// comes as soon as the thread has cleaned up. Accepted too, and without effect, where the migration
    /// has failed already.
    Accepted,
    /// The guest was given to the destination, or a destination has said READY, and its source alone
    /// decides; the migration runs to its end.
    TooLate,
}

/// A running migration. `R` is [`SourceReport`] or [`DestinationReport`].
///
/// Dropping the handle cancels the migration and does not wait: nothing would be left to read in the
/// report who owns the guest. A migration that has committed is past that: it runs to its end, which its
/// [`GuestControl`](crate::guest::GuestControl) sees.
#[derive(Debug)]
#[must_use = "dropping the handle cancels the migration"]
pub struct MigrationHandle<R> {
    canceller: Canceller,
    control: Option<Control>,
    statistics: SharedStatistics,
    events: Events,
    report: Receiver<R>,
    thread: Option<JoinHandle<()>>,
    name: &'static str,
}

impl<R> MigrationHandle<R> {
    /// The figures as they stand now; consistent with each other.
    pub fn progress(&self) -> Statistics {
        self.statistics.snapshot()
    }

    /// What has happened since the start and was not read yet; its [`descriptor`](Events::descriptor) can be waited for by
    /// epoll(7). The events end with the migration; the report may come a moment later. Without a last event ([`EventKind::is_last`](crate::observe::EventKind::is_last)) its thread died.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The figures while it runs; they may outlive this handle.
    pub fn statistics(&self) -> SharedStatistics {
        self.statistics.clone()
    }

    /// Asks for the end. Never blocks for long; the answer is final.
    pub fn cancel(&self) -> CancelReply {
        self.canceller.cancel()
    }

    /// Changes the migration while it runs; `None` at a destination, which follows its source.
    pub fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty() || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end. The session's own timeouts bound it, as far as the embedder's callbacks return.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library: a callback that panics does not
    /// end it. Whether the guest was given away by then is what [`cancel`](Self::cancel) answers before this call.
    pub fn wait(mut self) -> Result<R, Error> {
        let report = self.report.recv();
        if let Some(thread) = self.thread.take() {
            // A panic has left the report missing, which is told below.
            let _ = thread.join();
        }
        report.map_err(|_| died(self.name))
    }
}

impl<R> Drop for MigrationHandle<R> {
    fn drop(&mut self) {
        // Nothing to be told once the report was taken.
        if self.thread.is_some() && matches!(self.report.try_recv(), Err(TryRecvError::Empty)) {
            let _ = self.cancel();
        }
    }
}

fn died(name: &'static str) -> Error {
    let source = io::Error::other("it ended without a report, which is a fault of this library");
    Error::Thread { name, source }
}

/// Ends the channels of events with the thread, even if it panics.
struct Closes(SharedStatistics);

impl Drop for Closes {
    fn drop(&mut self) {
        self.0.close();
    }
}

fn start<R: Send + 'static>(
    spawner: &Spawner,
    name: &'static str,
    (canceller, control, statistics): (Canceller, Option<Control>, SharedStatistics),
    run: impl FnOnce() -> R + Send + 'static,
) -> Result<MigrationHandle<R>, Error> {
    let (give, report) = bounded(1);
    let events = statistics.events();
    let closes = Closes(statistics.clone());
    let job = move || {
        let _closes = closes;
        // Without a receiver nobody wants the report any more.
        let _ = give.send(run());
    };
    let thread = Some(spawner.spawn(name, Box::new(job))?);
    Ok(MigrationHandle { canceller, control, statistics, events, report, thread, name })
}

impl SourceSession {
    /// Asks this session for its end while it runs; of the token that it has now.
    pub fn canceller(&self) -> Canceller {
        self.control().canceller()
    }

    /// Runs the migration on a thread `ramwire-source` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; nothing was sent and the guest was not touched.
    pub fn spawn(self) -> Result<MigrationHandle<SourceReport>, Error> {
        let shared = (self.canceller(), Some(self.control()), self.statistics());
        start(&self.spawner(), "ramwire-source", shared, || self.run())
    }
}

impl DestinationSession {
    /// Runs the migration on a thread `ramwire-dest` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; nothing was received.
    pub fn spawn(self) -> Result<MigrationHandle<DestinationReport>, Error> {
        let shared = (self.canceller(), None, self.statistics());
        start(&self.spawner(), "ramwire-dest", shared, || self.run())
    }
}
