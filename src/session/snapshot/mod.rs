//! A snapshot of a running guest that is one moment's state.
//!
//! Most of the guest's memory is protected from writes while it still runs. It is paused while its device state is
//! saved and the pages it has written since are protected again; then it continues. Pages are copied in the background,
//! those that the guest wants to write first: a writer waits for the copy of its page, and for nothing else. A copy is
//! sent whenever its receiver has time.

mod callbacks;
#[cfg(test)]
mod chain_tests;
mod changes;
mod copies;
mod outlet;
mod run;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, bounded};

use crate::engine::SnapshotOutcome;
use crate::error::{Chain, Remedy};
use crate::guest::{DirtySource, GuestControl, GuestMemory};
use crate::observe::{LatencySummary, PageCounts};
use crate::session::handle::{CancelReply, Canceller};
use crate::session::workers::Spawner;
use crate::session::{Configuration, Error, Framing, SourceConnection};
use crate::sys::CancelToken;
use changes::Changes;
pub use changes::SnapshotBase;
use copies::Copies;
use run::Running;

/// A guest of which a snapshot is taken.
pub struct SnapshotGuest {
    /// Its memory, mapped in this process; each block has a [`region`](GuestMemory::region).
    pub memory: Arc<dyn GuestMemory>,
    /// Pause, resume, device state, and the promise to keep its memory.
    pub control: Box<dyn GuestControl>,
    /// Other writers to its memory that bypass this process's page tables, by name: vhost-user back ends, other
    /// processes that map it, devices with DMA (VFIO). Their writes are not seen, so a guest that has some is refused.
    pub other_writers: Vec<String>,
}

/// Settings of a snapshot.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SnapshotSettings {
    /// The machine as the stream describes it; a QEMU compares it with its own.
    pub configuration: Configuration,
    /// Whether there is a configuration section and footers: as the machine that will load it expects. Both.
    pub framing: Framing,
    /// Bytes of copies that may wait to be written; 64 MiB. The guest waits when it is full, and needs at least four of its
    /// largest pages.
    pub buffer: u64,
    /// Without a copy written for so long, while some wait, the snapshot fails and the guest continues; 30 s.
    pub stall_timeout: Duration,
    /// Hold writes of this process's own threads only; false. Needs no privilege. Writes that the kernel makes (KVM's
    /// vCPUs, read(2) into guest memory) then fail for their caller: only for a guest without such writes.
    pub user_mode_only: bool,
    /// How threads are started.
    pub spawner: Spawner,
}

impl SnapshotSettings {
    /// The defaults for a guest of this machine.
    pub fn new(configuration: Configuration) -> Self {
        Self {
            configuration,
            framing: Framing::default(),
            buffer: 64 << 20,
            stall_timeout: Duration::from_secs(30),
            user_mode_only: false,
            spawner: Spawner::default(),
        }
    }
}

/// How a snapshot ended, and its figures. The guest continues unless it [stands still](Self::not_resumed).
#[derive(Debug)]
#[non_exhaustive]
pub struct SnapshotReport {
    /// Whether there is a snapshot.
    pub outcome: SnapshotOutcome,
    /// Why there is none.
    pub error: Option<Error>,
    /// Pages that were written, and those that are zero.
    pub pages: PageCounts,
    /// Bytes that were written.
    pub bytes: u64,
    /// How long its memory was protected before that, while the guest ran.
    pub ahead: Duration,
    /// Writes of the guest meanwhile that hit a protected page, whose protection was lifted at once.
    pub early_faults: u64,
    /// How long the guest was paused: from the call of [`GuestControl::pause`] until [`GuestControl::resume`] had
    /// returned.
    pub pause: Duration,
    /// Part of it until the device state was saved.
    pub state: Duration,
    /// Part of it for protecting memory that the guest had written or begun to use in the meantime.
    pub protect: Duration,
    /// How long it all took.
    pub total: Duration,
    /// Writes of the guest that had to wait for a copy.
    pub faults: u64,
    /// How long they waited, as this process measures it.
    pub fault_latency: LatencySummary,
    /// The guest was paused and could not be resumed.
    pub not_resumed: bool,
    /// What the next snapshot may be taken against: this one, if its changes are [reported](SnapshotSession::tracked);
    /// if it failed, the base that it had. None after a dirty source has failed: the next snapshot must be a whole one.
    pub base: Option<SnapshotBase>,
}

/// A snapshot before it is taken.
pub struct SnapshotSession {
    guest: SnapshotGuest,
    copies: Arc<Copies>,
    settings: SnapshotSettings,
    canceller: Canceller,
    changes: Changes,
    #[cfg(test)]
    fails_at: Option<u32>,
}

impl SnapshotSession {
    /// Gets ready for a snapshot of `guest`, which is not touched yet.
    ///
    /// # Errors
    /// [`Error::Config`] for a guest of which there can be none, [`Error::Thread`] without memory for copies.
    pub fn new(guest: SnapshotGuest, settings: SnapshotSettings) -> Result<Self, Error> {
        if let Some(writer) = guest.other_writers.first() {
            return Err(Error::Config {
                what: format!(
                    "{writer} writes to the guest's memory without this process, where write protection does \
                    not stop it"
                ),
                remedy: Remedy::Advice(
                    "take it off the guest for the snapshot, or save the guest while it is paused",
                ),
            });
        }
        if let Some(block) = guest.memory.table().blocks().iter().find(|block| block.flags.ignored) {
            return Err(Error::Config {
                what: format!(
                    "RAM block {} is left out as shared, so that there would be no snapshot of it",
                    block.name
                ),
                remedy: Remedy::Advice("leave no block out (BlockFlags::ignored)"),
            });
        }
        let copies =
            Copies::new(Arc::clone(&guest.memory), settings.buffer).map_err(|error| Error::Config {
                what: format!("no memory for copies: {}", Chain(&error)),
                remedy: Remedy::Advice("give a smaller buffer (SnapshotSettings::buffer)"),
            })?;
        let canceller = Canceller::default();
        Ok(Self {
            guest,
            copies: Arc::new(copies),
            settings,
            canceller,
            changes: Changes::tracked(Vec::new()),
            #[cfg(test)]
            fails_at: None,
        })
    }

    /// `sources` report the writes after the snapshot's moment, so that a later one may hold only those pages:
    /// [`SnapshotReport::base`]. Together they must know of all writers, as for a migration; they stay on with that
    /// base.
    #[must_use]
    pub fn tracked(mut self, sources: Vec<Arc<dyn DirtySource>>) -> Self {
        self.changes = Changes::tracked(sources);
        self
    }

    /// Only the pages that have changed since `base` are written, into another `mapped:` file. Reading it needs the
    /// base's file.
    ///
    /// # Errors
    /// [`Error::Config`]: the guest's RAM blocks are not those of the base.
    pub fn since(mut self, base: SnapshotBase) -> Result<Self, Error> {
        base.check(&*self.guest.memory)?;
        self.changes = Changes::since(base);
        Ok(self)
    }

    /// What the connection must be opened with: its pages are the snapshot's, not what the guest has written since.
    pub fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::clone(&self.copies) as Arc<dyn GuestMemory>
    }

    /// Requests the end while it runs. Too late once all pages have been copied.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// A token that the caller has already. A [`canceller`](Self::canceller) that was taken before cancels nothing any more.
    pub fn with_cancel(mut self, cancel: CancelToken) -> Self {
        self.canceller = Canceller::over(cancel);
        self
    }

    /// Takes the snapshot on this thread, which serves the guest's writes meanwhile: no callback runs on it. `connection` was opened with [`memory`](Self::memory); answers on it are not read.
    pub fn run(self, connection: SourceConnection) -> SnapshotReport {
        Running::new(self, connection).run()
    }

    /// Takes the snapshot on a thread `ramwire-snap` of the settings' spawner.
    ///
    /// # Errors
    /// [`Error::Thread`]; the guest was not touched.
    pub fn spawn(self, connection: SourceConnection) -> Result<SnapshotHandle, Error> {
        let (give, report) = bounded(1);
        let (spawner, canceller) = (self.settings.spawner.clone(), self.canceller());
        let job = move || {
            // Without a receiver the report is no longer needed.
            let _ = give.send(self.run(connection));
        };
        drop(spawner.spawn("ramwire-snap", Box::new(job))?);
        Ok(SnapshotHandle { canceller, report })
    }

    #[cfg(test)]
    fn failing_at(mut self, action: u32) -> Self {
        self.fails_at = Some(action);
        self
    }
}

/// A snapshot that is being taken. Dropping the handle cancels it.
#[derive(Debug)]
#[must_use = "dropping the handle cancels the snapshot"]
pub struct SnapshotHandle {
    canceller: Canceller,
    report: Receiver<SnapshotReport>,
}

impl SnapshotHandle {
    /// Requests the end. Never blocks for long.
    pub fn cancel(&self) -> CancelReply {
        self.canceller.cancel()
    }

    /// True once [`wait`](Self::wait) would not wait.
    pub fn is_finished(&self) -> bool {
        !self.report.is_empty()
    }

    /// Waits for the end.
    ///
    /// # Errors
    /// [`Error::Thread`] if the thread died without a report, by a fault of this library; its protection is lifted then.
    pub fn wait(self) -> Result<SnapshotReport, Error> {
        self.report.recv().map_err(|_| Error::Thread {
            name: "ramwire-snap",
            source: std::io::Error::other("it ended without a report, which is a fault of this library"),
        })
    }
}

impl Drop for SnapshotHandle {
    fn drop(&mut self) {
        let _ = self.canceller.cancel();
    }
}
