//! Another process's memory, which is served until that process ends.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use crate::engine::{BlockToFill, Fill};
use crate::ram::{PageBitmap, PageRun};
use crate::transport::{PageSupply, StoredMemory};
use crate::units::{BlockIndex, PageIndex, PageSize};

use super::handed::{self, HandedPages};
use super::{Filling, HandedRegion, LazyProgress, PageFailure};
use crate::session::Error;
use crate::session::workers::Spawner;

/// How memory is served.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ServeSettings {
    /// Number of threads that serve faults, at least one. Default 1.
    pub fault_threads: u8,
    /// Threads that read pages that no thread waits for. Default 1; with 0 only touched pages are read.
    pub readers: u8,
    /// How threads are started.
    pub spawner: Spawner,
}

impl Default for ServeSettings {
    fn default() -> Self {
        Self { fault_threads: 1, readers: 1, spawner: Spawner::default() }
    }
}

/// Memory of another process, which is filled from a stored memory. Dropping it ends this: a thread of the other
/// process that touches a missing page then waits for ever.
#[derive(Debug)]
pub struct ServedMemory {
    filling: Arc<Filling>,
    threads: Vec<JoinHandle<()>>,
}

/// The stored memory, with the positions of the regions in it.
struct Regions {
    stored: Arc<StoredMemory>,
    offsets: Vec<u64>,
}

impl PageSupply for Regions {
    fn read(&self, block: BlockIndex, offset: u64, into: &mut [u8]) -> std::io::Result<()> {
        let region = self.offsets.get(block.as_usize()).copied().unwrap_or(u64::MAX);
        self.stored.read_at(region.saturating_add(offset), into)
    }

    fn name(&self) -> String {
        self.stored.name()
    }
}

impl ServedMemory {
    /// Serves the faults that arrive on `fd`, a userfaultfd(2) of the process that owns `regions`, and reads the rest.
    ///
    /// # Errors
    /// [`Error::Handed`]: the handed-over regions are invalid. [`Error::Thread`].
    pub fn serve(
        fd: OwnedFd,
        regions: &[HandedRegion],
        stored: &Arc<StoredMemory>,
        settings: &ServeSettings,
    ) -> Result<Self, Error> {
        handed::checked(regions, stored.len())?;
        let memory = HandedPages::new(fd, regions)?;
        let blocks = regions.iter().map(|region| BlockToFill {
            present: stored.present(region.offset, region.len, handed::PAGE),
            host_page: PageSize::from_bytes(region.page).unwrap_or(handed::PAGE),
        });
        let mut fill = Fill::new(handed::PAGE, blocks.collect());
        for (index, region) in (0..).map(BlockIndex).zip(regions) {
            if let Some(missing) = fill.missing(index) {
                holes(missing, region.len / handed::PAGE.bytes(), |first, pages| {
                    memory.mark(PageRun { block: index, first: PageIndex(first), pages });
                });
            }
        }
        fill.open();
        let offsets = regions.iter().map(|region| region.offset).collect();
        let supply = Arc::new(Regions { stored: Arc::clone(stored), offsets });
        let filling = Arc::new(Filling::new(Box::new(memory), supply, handed::PAGE, fill));
        let mut this = Self { filling: Arc::clone(&filling), threads: Vec::new() };
        for _ in 0..settings.fault_threads.max(1) {
            let serving = Arc::clone(&filling);
            this.threads
                .push(settings.spawner.spawn("ramwire-faults", Box::new(move || serving.serve_faults()))?);
        }
        for _ in 0..settings.readers {
            let reading = Arc::clone(&filling);
            this.threads
                .push(settings.spawner.spawn("ramwire-file-rx", Box::new(move || reading.read_rest()))?);
        }
        Ok(this)
    }

    /// Its progress; the pages have 4 KiB.
    pub fn progress(&self) -> LazyProgress {
        self.filling.progress()
    }

    /// The first page that could not be read or placed, since the last [`retry`](Self::retry).
    pub fn failure(&self) -> Option<PageFailure> {
        self.filling.failure()
    }

    /// Retries pages that could not be read or placed, requested pages first. Returns the number of these pages.
    pub fn retry(&self) -> u64 {
        self.filling.retry()
    }

    /// Stops serving it. Returns its progress, including the work that its threads had in progress.
    pub fn end(mut self) -> LazyProgress {
        self.end_threads();
        self.progress()
    }

    /// True once there is no process to serve any more: the other process has ended, or its faults can't be read.
    pub fn is_over(&self) -> bool {
        self.filling.state().is_over
    }

    fn end_threads(&mut self) {
        self.filling.end();
        for thread in self.threads.drain(..) {
            // A panic there was reported where it happened.
            let _ = thread.join();
        }
    }
}

impl Drop for ServedMemory {
    fn drop(&mut self) {
        self.end_threads();
    }
}

/// Calls `hole` with each run of pages that is clear.
pub(in crate::session) fn holes(map: &PageBitmap, pages: u64, mut hole: impl FnMut(u64, u64)) {
    let mut at = 0;
    while at < pages {
        let run = map.next_run(PageIndex(at), u64::MAX).unwrap_or(pages..pages);
        if run.start > at {
            hole(at, run.start - at);
        }
        at = run.end;
    }
}
