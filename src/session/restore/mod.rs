//! A guest that is started from a file: its memory is read first, or while it runs.
//!
//! Both modes are a [`DestinationSession`] over the file. Eager: the memory is read first, with the file's pages as
//! page channels. Lazy: the session loads only the device state; by then its memory is empty and under userfaultfd(2),
//! and [`LazyPages`] reads first the pages that threads wait for, then the rest.

mod lazy_link;
mod lazy_pages;
mod working_set;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use crate::engine::Ending;
use crate::guest::ServeError;
use crate::sys::{Lock as _, MissingFaults};
use crate::transport::{Address, DestinationConnection, MappedDestination, OpenError, PageSupply};

use super::{DestinationGuest, DestinationReport, DestinationSession, DestinationSettings, Error};
use lazy_link::LazyLink;
pub use lazy_pages::LazyPages;

/// When the memory of a guest is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum RestoreWay {
    /// All of it before the guest runs.
    #[default]
    Eager,
    /// Pages when the guest touches them; the rest while it runs.
    Lazy,
}

/// Settings of a restore.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RestoreSettings {
    /// When memory is read.
    pub way: RestoreWay,
    /// Number of threads that read pages (lazy: those that no thread waits for); 0, the default: one for each core, at
    /// most four.
    pub threads: u8,
    /// Lazy: only threads of this process in user mode access the memory: no KVM guest, and no system call with its
    /// addresses. Then no privilege is needed. Default false.
    pub user_mode_only: bool,
    /// Lazy: a file next to the snapshot that records which pages were touched, in that order. These pages are read
    /// first; when all pages are placed the file is written again. Default none.
    pub working_set: Option<PathBuf>,
    /// Settings of the destination.
    pub destination: DestinationSettings,
}

/// Result of starting a guest from a file.
#[derive(Debug)]
#[must_use = "the memory of a lazily restored guest is read in the background"]
pub struct Restored {
    /// As for any arriving guest. [`Ending::Running`]: it runs.
    pub report: DestinationReport,
    /// The pages that are read while it runs: if lazy and it runs or may run.
    pub pages: Option<LazyPages>,
}

/// A guest that is to be started from a mapped-ram file.
///
/// ```no_run
/// use ramwire::session::{DestinationGuest, RestoreSession, RestoreSettings, RestoreWay};
/// # fn restore(guest: DestinationGuest) -> Result<(), Box<dyn std::error::Error>> {
/// let mut settings = RestoreSettings::default();
/// settings.way = RestoreWay::Lazy;
/// let restored = RestoreSession::open(guest, &"mapped:vm.save".parse()?, settings)?.run()?;
/// // The guest runs.
/// if let Some(pages) = restored.pages {
///     while let Err(failure) = pages.wait() {
///         eprintln!("{failure}");
///         pages.retry();
///     }
/// }
/// # Ok(())
/// # }
/// ```
pub struct RestoreSession {
    guest: DestinationGuest,
    file: MappedDestination,
    settings: RestoreSettings,
    /// Source of pages in place of the file.
    supply: Option<Arc<dyn PageSupply>>,
}

impl RestoreSession {
    /// Opens the file of a `mapped:` address, and reads all of it except its pages.
    ///
    /// # Errors
    /// [`OpenError`]: there is no whole guest in it, or the address is of another kind.
    pub fn open(
        guest: DestinationGuest,
        address: &Address,
        settings: RestoreSettings,
    ) -> Result<Self, OpenError> {
        Ok(Self { guest, file: MappedDestination::open(address)?, settings, supply: None })
    }

    /// Reads pages from `supply` instead of the file, which still determines which pages exist. Lazy only.
    #[must_use]
    pub fn with_supply(mut self, supply: Arc<dyn PageSupply>) -> Self {
        self.supply = Some(supply);
        self
    }

    /// Starts the guest, on this thread. Lazy: returns when it runs, or has failed.
    ///
    /// # Errors
    /// Lazy: [`Error::Serve`] where this process may not serve faults. Nothing has been done then. What fails later is in the
    /// report.
    pub fn run(self) -> Result<Restored, Error> {
        let Self { guest, file, settings, supply } = self;
        if settings.way == RestoreWay::Eager {
            let file = file.read_by(settings.threads, settings.destination.spawner.callback());
            let connection = DestinationConnection::new(Box::new(file), None);
            let report = DestinationSession::new(guest, connection, settings.destination).run();
            return Ok(Restored { report, pages: None });
        }
        let faults = match settings.user_mode_only {
            true => MissingFaults::user_mode_only(),
            false => MissingFaults::new(),
        };
        let faults = faults.map_err(ServeError::from)?;
        let begun = Arc::new(Mutex::new(None));
        let destination = settings.destination.clone();
        let link = LazyLink::new(file, faults, supply, settings, Arc::clone(&begun));
        let connection = DestinationConnection::new(Box::new(link), None);
        let report = DestinationSession::new(guest, connection, destination).run();
        let pages: Option<LazyPages> = begun.locked().take();
        let pages = match (report.ending, pages) {
            // No thread uses that memory.
            (Ending::Discarded, Some(pages)) => {
                pages.end();
                None
            }
            (_, pages) => pages,
        };
        if let Some(pages) = &pages {
            pages.read_rest();
        }
        Ok(Restored { report, pages })
    }
}

/// What tests set.
#[cfg(test)]
impl RestoreSession {
    pub(in crate::session) fn settings_mut(&mut self) -> &mut RestoreSettings {
        &mut self.settings
    }
}
