//! An embedder's handle for a migration on a thread of its own: progress, cancel, and its report.
//!
//! # Required order
//!
//! A cancel and COMMIT are decided under one lock. After an accepted cancel the guest stays where it is; a cancel that
//! is too late has no effect.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam::channel::{Receiver, TryRecvError, bounded};

use crate::observe::{Events, SharedStatistics, Statistics};
use crate::sys::{CancelToken, Lock as _};

use crate::session::control::Control;
use crate::session::workers::Spawner;
use crate::session::{DestinationReport, DestinationSession, Error, SourceReport, SourceSession};

/// Whether the guest has been handed over, as a cancel needs to know it.
#[derive(Debug, Default)]
struct Commitment(Mutex<bool>);

impl Commitment {
    /// Runs one `step` of an engine, which returns whether the guest is committed afterwards.
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

/// Requests the end of a migration, from any thread; clones belong to the same one.
#[derive(Clone, Debug, Default)]
pub struct Canceller {
    commitment: Arc<Commitment>,
    cancel: CancelToken,
}

impl Canceller {
    /// Requests the end. Never blocks for long; the reply is final.
    pub fn cancel(&self) -> CancelReply {
        self.commitment.cancel(&self.cancel)
    }

    /// For a token that the caller already has.
    pub(super) fn over(cancel: CancelToken) -> Self {
        Self { commitment: Arc::default(), cancel }
    }

    /// What wakes the waits.
    pub(super) fn token(&self) -> CancelToken {
        self.cancel.clone()
    }

    /// Runs one `step` of an engine, which returns whether the guest is committed afterwards. No cancel comes in
    /// between.
    pub(super) fn decide<T>(&self, step: impl FnOnce() -> (T, bool)) -> T {
        self.commitment.decide(step)
    }
}

/// Result of a cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a cancel that came too late changes nothing: the guest goes to the destination"]
pub enum CancelReply {
    /// The guest stays at the source: a source resumes it, a destination discards what it received. The report follows
    /// as soon as the thread has cleaned up. Also accepted, without effect, if the migration has already failed.
    Accepted,
    /// The guest was handed to the destination, or a destination has sent READY and only its source decides; the
    /// migration runs to its end.
    TooLate,
}

/// A running migration. `R` is [`SourceReport`] or [`DestinationReport`].
///
/// Dropping the handle cancels the migration and does not wait, since the report, which says who owns the guest, could
/// no longer be read. A committed migration can't be cancelled: it runs to its end, which its
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
    /// The current figures; consistent with each other.
    pub fn progress(&self) -> Statistics {
        self.statistics.snapshot()
    }

    /// The events since the start that were not read yet; epoll(7) can wait for them by the
    /// [`descriptor`](Events::descriptor). The events end with the migration; the report may follow a moment later. If
    /// there is no last event ([`EventKind::is_last`](crate::observe::EventKind::is_last)), its thread died.
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The figures while it runs; they may outlive this handle.
    pub fn statistics(&self) -> SharedStatistics {
        self.statistics.clone()
    }

    /// Requests the end. Never blocks for long; the reply is final.
    pub fn cancel(&self) -> CancelReply {
        self.canceller.cancel()
    }

    /// Changes the migration while it runs; `None` at a destination, which follows its source.
    pub fn control(&self) -> Option<&Control> {
        self.control.as_ref()
    }

    /// True once [`wait`](Self::wait) would not block.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty() || self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end and returns the report. The session's own timeouts limit the wait, if the embedder's callbacks
    /// return. A migration that failed has a report, too, with the reason in its `error`: also after a failure the caller
    /// must read from it who owns the guest.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library: a callback that panics does
    /// not end it. The reply of a [`cancel`](Self::cancel) before this call shows whether the guest was handed over by
    /// then.
    pub fn wait(mut self) -> Result<R, Error> {
        let report = self.report.recv();
        if let Some(thread) = self.thread.take() {
            // After a panic the report is missing, which is returned as an error below.
            let _ = thread.join();
        }
        report.map_err(|_| died(self.name))
    }
}

impl<R> Drop for MigrationHandle<R> {
    fn drop(&mut self) {
        // No warning if the report was taken.
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
        // Without a receiver the report is not needed any more.
        let _ = give.send(run());
    };
    let thread = Some(spawner.spawn(name, Box::new(job))?);
    Ok(MigrationHandle { canceller, control, statistics, events, report, thread, name })
}

impl SourceSession {
    /// Requests this session's end while it runs; uses its present token.
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
