//! Memory whose missing pages are served.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex};

use crate::engine::Waiter;
use crate::error::Chain;
use crate::guest::{GuestError, Placer, VcpuThreads};
use crate::ram::PageRun;
use crate::sys::{Lock as _, MissingFaults, PageContents};
use crate::units::{BlockIndex, PageSize};

/// Why a page could not be placed, or a fault not be read.
#[derive(Debug)]
pub(in crate::session) enum PlaceError {
    /// The process that owns the memory has ended.
    Gone,
    /// The kernel's error, as text.
    Failed(String),
}

impl From<GuestError> for PlaceError {
    fn from(error: GuestError) -> Self {
        Self::Failed(Chain(&error).to_string())
    }
}

/// Memory whose missing pages are served: of this process, or of another.
///
/// # Required orders
///
/// A page is placed once, whichever thread reads it: a page that its owner has freed since is zero, and is not placed
/// again.
pub(in crate::session) trait PagedMemory: Send + Sync {
    /// Readable while there is a fault to read.
    fn descriptor(&self) -> BorrowedFd<'_>;

    /// The next host page that a thread waits for, and who that is, without waiting for one.
    ///
    /// # Errors
    /// [`PlaceError`].
    fn next_fault(&self) -> Result<Option<(PageRun, Waiter)>, PlaceError>;

    /// The vCPUs whose threads are known, if the list has changed since the last call.
    fn changed_vcpus(&self) -> Option<Vec<u32>> {
        None
    }

    /// True if the page has been placed, or is zero and was never missing.
    fn is_received(&self, page: PageRun) -> bool;

    /// Places those of the host pages that have not been placed, and wakes the threads that wait for them.
    ///
    /// # Errors
    /// [`PlaceError`].
    fn place(&self, run: PageRun, contents: PageContents<'_>) -> Result<(), PlaceError>;

    /// A thread waits for a page that was already received: it is zero, or present by now.
    ///
    /// # Errors
    /// [`PlaceError`].
    fn answer_received(&self, page: PageRun) -> Result<(), PlaceError>;

    /// Pages of a block's memory.
    fn host_page(&self, block: BlockIndex) -> PageSize;

    /// A block's name, for errors.
    fn block_name(&self, block: BlockIndex) -> String;

    /// Accesses wait no more.
    fn let_go(&self);
}

/// Memory of a guest in this process.
pub(in crate::session) struct GuestPages {
    placer: Arc<Placer>,
    faults: Arc<MissingFaults>,
    vcpus: VcpuThreads,
    /// Version of their list that was told.
    known: Mutex<u64>,
}

impl GuestPages {
    /// The pages of a placer that [serves](Placer::serve_missing) `faults`.
    pub(in crate::session) fn new(placer: Arc<Placer>, faults: Arc<MissingFaults>) -> Self {
        Self { placer, faults, vcpus: VcpuThreads::default(), known: Mutex::default() }
    }

    /// The threads of these vCPUs are told from others.
    pub(in crate::session) fn used_by(self, vcpus: VcpuThreads) -> Self {
        Self { vcpus, ..self }
    }
}

impl PagedMemory for GuestPages {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.faults.as_fd()
    }

    fn changed_vcpus(&self) -> Option<Vec<u32>> {
        self.vcpus.changed(&mut self.known.locked())
    }

    fn next_fault(&self) -> Result<Option<(PageRun, Waiter)>, PlaceError> {
        loop {
            let fault = self.faults.next().map_err(|error| PlaceError::Failed(error.to_string()))?;
            let Some(fault) = fault else { return Ok(None) };
            if let Some(landing) = self.placer.host_page_at(fault.at) {
                let who = Waiter { thread: fault.thread, vcpu: self.vcpus.vcpu_of(fault.thread) };
                return Ok(Some((self.placer.run(landing), who)));
            }
        }
    }

    fn is_received(&self, page: PageRun) -> bool {
        self.placer.first_missing(page).is_none()
    }

    fn place(&self, run: PageRun, contents: PageContents<'_>) -> Result<(), PlaceError> {
        let landing = self.placer.memory().table().admit_run(run).map_err(GuestError::from)?;
        Ok(self.placer.place_contents(landing, contents)?)
    }

    fn answer_received(&self, page: PageRun) -> Result<(), PlaceError> {
        let landing = self.placer.memory().table().admit_run(page).map_err(GuestError::from)?;
        Ok(self.placer.answer_received(landing)?)
    }

    fn host_page(&self, block: BlockIndex) -> PageSize {
        let table = self.placer.memory().table();
        table.get(block).map_or(table.page(), |block| block.host_page)
    }

    fn block_name(&self, block: BlockIndex) -> String {
        let table = self.placer.memory().table();
        table.get(block).map_or_else(|| format!("number {}", block.0), |block| block.name.to_string())
    }

    fn let_go(&self) {
        self.placer.stop_serving();
    }
}
