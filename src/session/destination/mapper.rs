//! Maps pages after their arrival: those that were written through the backing file, which are in no page table of this
//! process yet.
//!
//! The thread runs only while a core is otherwise idle, so that it does not slow the migration. A page that it has not
//! reached is mapped by a fault, as without it. It only maps pages that were received whole: a page that was sent as
//! zero never costs memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::guest::{GuestError, Placer};
use crate::ram::{PageBitmap, PageRun};
use crate::sys::{CancelToken, Stop, only_when_idle, populate};
use crate::units::{BlockIndex, PageIndex};

use crate::session::workers::Spawner;

/// Rest of the thread while no page has arrived.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);

/// Pages that are mapped by one call: few, so that the end does not wait long.
const PAGES_A_CALL: u64 = 64;

/// The thread, which ends with this value.
#[derive(Debug)]
pub(super) struct Mapper {
    cancel: CancelToken,
    mapped: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Mapper {
    /// Starts the thread, if there is memory with a backing file. Without the thread there are only more faults.
    pub(super) fn start(placer: &Arc<Placer>, spawner: &Spawner) -> Option<Self> {
        if !placer.has_files() {
            return None;
        }
        let (cancel, mapped) = (CancelToken::default(), Arc::new(AtomicU64::new(0)));
        let (placer, stop, count) = (Arc::clone(placer), Stop::on(&cancel), Arc::clone(&mapped));
        let thread = spawner.spawn("ramwire-mapper", Box::new(move || follow(&placer, &stop, &count)));
        let thread =
            thread.inspect_err(|error| tracing::debug!(%error, "pages are mapped by faults")).ok()?;
        Some(Self { cancel, mapped, thread: Some(thread) })
    }

    /// After this, only the pages of the current call are still mapped.
    pub(super) fn stop(&self) {
        self.cancel.cancel();
    }

    /// Waits for the thread's end; returns the number of pages it has mapped.
    pub(super) fn finish(mut self) -> u64 {
        self.end();
        self.mapped.load(Ordering::Relaxed)
    }

    fn end(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // A panic there left pages unmapped, which faults will map.
            let _ = thread.join();
        }
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        self.end();
    }
}

/// Maps received pages, block after block, until stopped.
fn follow(placer: &Placer, stop: &Stop, mapped: &AtomicU64) {
    if let Err(error) = only_when_idle() {
        tracing::debug!(%error, "the mapping thread runs at normal priority");
    }
    let mut found: Vec<PageBitmap> = placer.unmapped().iter().map(|map| PageBitmap::new(map.len())).collect();
    loop {
        let mut any = false;
        for (index, (came, found)) in placer.unmapped().iter().zip(&mut found).enumerate() {
            came.take_into(found);
            let mut from = PageIndex(0);
            while let Some(run) = found.next_run(from, PAGES_A_CALL) {
                if stop.reason().is_some() {
                    return;
                }
                from.0 = run.end;
                let (first, pages) = (PageIndex(run.start), run.end - run.start);
                let run = PageRun { block: BlockIndex(index as u32), first, pages };
                let landing = placer.memory().table().admit_run(run).map_err(GuestError::from);
                // A kernel without support is no problem: the pages are present, and a fault maps them.
                if landing.and_then(|landing| placer.target(landing)).is_ok_and(|span| populate(span).is_ok())
                {
                    mapped.fetch_add(pages, Ordering::Relaxed);
                }
                any = true;
            }
            found.clear_range(0..found.len());
        }
        if !any && stop.sleep(RETRY_INTERVAL).is_some() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::IoSlice;

    use super::*;
    use crate::guest::MappedGuest;
    use crate::ram::{BlockName, RamBlock};
    use crate::sys::{Mapping, thread_page_faults};
    use crate::units::{BlockOffset, PageSize};

    fn placer(mapping: &Mapping) -> Arc<Placer> {
        let block = RamBlock::new(BlockName::new("ram").unwrap(), mapping.region().len());
        let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block.clone(), mapping).build().unwrap();
        Arc::new(Placer::new(Arc::new(guest), &[block], None).unwrap())
    }

    /// Pages that were written through the file are mapped, no other page takes memory, and the bytes are those that
    /// arrived.
    #[test]
    fn what_came_by_the_file_is_mapped_and_nothing_else() {
        const PAGES: u64 = 1000;
        let mapping = Mapping::memfd("ram", 2 * PAGES * 4096).unwrap();
        let placer = placer(&mapping);
        let mapper = Mapper::start(&placer, &Spawner::default()).unwrap();
        let page = [7; 4096];
        for at in 0..PAGES {
            // Every second page: none of those between may be touched.
            let landing = placer.admit(BlockIndex(0), BlockOffset(2 * at * 4096), 4096).unwrap();
            assert!(placer.write_by_file(landing, 0, &[IoSlice::new(&page)]).unwrap());
            placer.commit(landing);
        }
        while mapper.mapped.load(Ordering::Relaxed) < PAGES {
            std::thread::yield_now();
        }
        assert_eq!(mapper.finish(), PAGES);
        assert_eq!(placer.by_file(), PAGES);
        let blocks = rustix::fs::fstat(mapping.backing().unwrap().0).unwrap().st_blocks;
        assert_eq!(blocks as u64, PAGES * 8, "only what came takes memory");
        let before = thread_page_faults().unwrap();
        let mut byte = [0];
        for at in 0..PAGES {
            mapping.region().span(2 * at * 4096 + 9, 1).unwrap().copy_to(&mut byte);
            assert_eq!(byte, [7]);
        }
        let faults = thread_page_faults().unwrap() - before;
        assert!(faults < PAGES / 2, "{faults} faults in memory that is mapped");
    }

    #[test]
    fn memory_without_a_file_needs_no_thread() {
        assert!(Mapper::start(&placer(&Mapping::anonymous(8192).unwrap()), &Spawner::default()).is_none());
    }
}
