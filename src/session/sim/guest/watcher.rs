//! An observer of each arriving page, like a relay.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{PAGE, page_of};
use crate::guest::{GuestMemory, PageObserver};
use crate::ram::PageRun;
use crate::session::sim::world::Sim;
use crate::session::{Error, Incoming, IncomingObserver};

/// Copies each page as soon as it is reported, as a relay may.
pub(in crate::session::sim) struct Watcher {
    pub(in crate::session::sim) sim: Sim,
    copies: Arc<Copies>,
}

struct Copies {
    sim: Sim,
    pages: Mutex<Vec<Vec<Option<Vec<u8>>>>>,
}

impl Watcher {
    pub(in crate::session::sim) fn new(sim: &Sim) -> Self {
        let blocks = sim.world().plan.blocks.clone();
        let pages = blocks.iter().map(|(pages, _)| vec![None; *pages as usize]).collect();
        Self { sim: sim.clone(), copies: Arc::new(Copies { sim: sim.clone(), pages: Mutex::new(pages) }) }
    }
}

impl PageObserver for Copies {
    fn placed(&self, run: PageRun) {
        let world = self.sim.world();
        let mut pages = self.pages.lock().unwrap();
        for page in run.first.0..run.end().0 {
            let mut copy = vec![0; PAGE];
            page_of(&world.guest.memory[1], run.block.0, page).copy_to(&mut copy);
            pages[run.block.as_usize()][page as usize] = Some(copy);
        }
    }
}

impl IncomingObserver for Watcher {
    fn watch(&mut self, _memory: &Arc<dyn GuestMemory>) -> Arc<dyn PageObserver> {
        Arc::clone(&self.copies) as Arc<dyn PageObserver>
    }

    fn began(&mut self, _: &Incoming, _: &Arc<dyn GuestMemory>, _: u32) -> Result<(), Error> {
        Ok(())
    }

    fn between_reads(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn ram_complete(&mut self, _scan: Option<Duration>) -> Result<(), Error> {
        let mut world = self.sim.world();
        let mut now = vec![0; PAGE];
        for (block, copies) in self.copies.pages.lock().unwrap().iter().enumerate() {
            for (page, copy) in copies.iter().enumerate() {
                page_of(&world.guest.memory[1], block as u32, page as u64).copy_to(&mut now);
                if copy.as_ref().is_some_and(|copy| *copy != now) {
                    world.violation(format!("page {page} of block{block} was told before it was there"));
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}
