//! The dirty logs, each of a different kind.

use std::io;

use crate::guest::{DirtyError, DirtySource};
use crate::ram::{PageBitmap, PageRun};
use crate::session::sim::plan::{Fault, LogKind, Plan, Side};
use crate::session::sim::world::{Sim, World};
use crate::units::{BlockIndex, PageIndex};

/// A dirty log.
#[derive(Debug)]
pub(in crate::session::sim) struct LogState {
    kind: LogKind,
    pub(in crate::session::sim) on: bool,
    written: Vec<PageBitmap>,
    /// Bits that were read and not cleared, or that were taken when the sync began.
    read: Vec<PageBitmap>,
}

impl LogState {
    pub(in crate::session::sim) fn new(kind: LogKind, plan: &Plan) -> Self {
        let empty: Vec<_> = plan.blocks.iter().map(|(pages, _)| PageBitmap::new(*pages)).collect();
        Self { kind, on: false, written: empty.clone(), read: empty }
    }

    pub(in crate::session::sim) fn wrote(&mut self, block: u32, page: u64) {
        if self.on {
            self.written[block as usize].set_range(page..page + 1);
        }
    }
}

fn or(from: &PageBitmap, into: &mut PageBitmap) {
    into.merge_words(0, from.words());
}

/// The handle of one log.
pub(in crate::session::sim) struct SimLog {
    pub(in crate::session::sim) sim: Sim,
    pub(in crate::session::sim) index: usize,
}

impl SimLog {
    /// One call, which is a step, and fails if planned.
    fn call(&self, act: impl FnOnce(&mut World, usize)) -> Result<(), DirtyError> {
        self.sim.device_acts(Side::Source);
        let mut turn = self.sim.enter();
        let calls = turn.world.log_calls;
        turn.world.log_calls += 1;
        if turn.world.fails(|fault| matches!(fault, Fault::Log { call } if *call == calls)) {
            let source = io::Error::other("as the plan wants it");
            assert!(!turn.world.panics(), "as the plan wants it");
            return Err(DirtyError::Kernel { source_name: "sim", what: "a call", source });
        }
        act(&mut turn.world, self.index);
        turn.step();
        Ok(())
    }
}

impl DirtySource for SimLog {
    fn name(&self) -> &'static str {
        "sim"
    }

    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.call(|world, index| {
            let log = &mut world.logs[index];
            let all_set = log.kind == LogKind::ByChunk { all_set: true };
            for map in log.written.iter_mut().chain(&mut log.read) {
                map.clear_range(0..u64::MAX);
            }
            for map in log.written.iter_mut().filter(|_| all_set) {
                map.set_range(0..u64::MAX);
            }
            log.on = true;
        })
    }

    fn begin_sync(&self) -> Result<(), DirtyError> {
        self.call(|world, index| {
            if index == 0 {
                world.device.logs_are_read();
            }
            let log = &mut world.logs[index];
            if log.kind == LogKind::Snapshot {
                for (written, read) in log.written.iter_mut().zip(&mut log.read) {
                    or(written, read);
                    written.clear_range(0..u64::MAX);
                }
            }
        })
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        self.call(|world, index| {
            let log = &mut world.logs[index];
            let (written, read) = (&mut log.written[block.as_usize()], &mut log.read[block.as_usize()]);
            match log.kind {
                LogKind::AtSync => {
                    or(written, into);
                    written.clear_range(0..u64::MAX);
                }
                LogKind::ByChunk { .. } => {
                    or(written, into);
                    or(written, read);
                }
                LogKind::Snapshot => {
                    or(read, into);
                    read.clear_range(0..u64::MAX);
                }
            }
            world.link.unconfirm(block, into);
        })
    }

    fn reprotect(&self, run: PageRun) -> Result<(), DirtyError> {
        self.call(|world, index| {
            let log = &mut world.logs[index];
            if !matches!(log.kind, LogKind::ByChunk { .. }) {
                return;
            }
            let (written, read) =
                (&mut log.written[run.block.as_usize()], &mut log.read[run.block.as_usize()]);
            // Only bits that were read are cleared: a page first written since then is not known yet.
            for page in
                (run.first.0..run.end().0).filter(|page| read.get(PageIndex(*page))).collect::<Vec<_>>()
            {
                written.clear_range(page..page + 1);
                read.clear_range(page..page + 1);
            }
        })
    }

    fn stop(&self) -> Result<(), DirtyError> {
        self.call(|world, index| world.logs[index].on = false)
    }
}
