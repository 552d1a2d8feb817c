//! What a seed means for one snapshot.

use std::time::Duration;

use super::super::plan::Rng;
use crate::engine::SnapshotConfig;
use crate::ram::{BlockName, PageRun, RamBlock, RamBlockTable};
use crate::units::{BlockIndex, PageIndex, PageSize};

/// A step, as the engine's clock counts.
pub(super) const STEP: Duration = Duration::from_millis(1);
/// Steps that a target may take nothing.
const STALL: u64 = 1500;

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    None,
    /// The so manyth action can't be done.
    Action(u64),
    /// What takes the copies fails at this step, or takes nothing more from there on.
    Lost(u64),
    Stalls(u64),
    /// The end is requested at this step.
    Cancel(u64),
    /// The VMM can't pause its guest, or save its state.
    Pause,
    State,
    /// The VMM can't resume its guest, and reports that after so many steps.
    Resume(u64),
    /// The so manyth reading of the dirty log fails, after the kernel has cleared it.
    Log(u64),
}

impl Fault {
    pub(super) fn of(rng: &mut Rng) -> Self {
        match rng.below(10) {
            0 => Self::Action(rng.below(30)),
            1 => Self::Lost(rng.below(400)),
            2 => Self::Stalls(rng.below(200)),
            3 => Self::Cancel(rng.below(400)),
            4 => Self::Resume(rng.pick(&[0, 20, 300])),
            5 => rng.pick(&[Self::Pause, Self::State]),
            _ => Self::None,
        }
    }
}

/// All that a seed decides before the first step.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Pages of each block, and target pages of its host pages.
    pub(super) blocks: Vec<(u64, u64)>,
    pub(super) writers: usize,
    pub(super) config: SnapshotConfig,
    /// Steps that a callback of the guest takes at most.
    pub(super) call_takes: u64,
    /// The target takes a copy in one of so many steps.
    pub(super) takes_every: u64,
    pub(super) fault: Fault,
    /// There is a dirty log.
    pub(super) tracked: bool,
}

impl Plan {
    pub(super) fn of(rng: &mut Rng) -> Self {
        let block = |rng: &mut Rng| {
            let host = rng.pick(&[1, 1, 2, 8]);
            ((1 + rng.below(10)) * host, host)
        };
        let blocks: Vec<_> = (0..1 + rng.below(3)).map(|_| block(rng)).collect();
        let fault = Fault::of(rng);
        let config = SnapshotConfig {
            slots: 1 + rng.below(4),
            trays: 2 + rng.below(4),
            tray_pages: 8,
            protect_pages: rng.pick(&[8, 16]),
            lift_pages: 8,
            pause_goal: STEP * rng.below(30) as u32,
            stall_timeout: STEP * STALL as u32,
        };
        let takes_every = rng.pick(&[1, 3, 20]);
        Self {
            blocks,
            writers: 1 + rng.below(4) as usize,
            config,
            call_takes: rng.below(60),
            takes_every,
            fault,
            tracked: false,
        }
    }

    pub(super) fn table(&self) -> RamBlockTable {
        let block = |(index, (pages, _)): (usize, &(u64, u64))| {
            RamBlock::new(BlockName::new(&format!("b{index}")).unwrap(), pages * 4096)
        };
        RamBlockTable::new(PageSize::SIZE_4K, self.blocks.iter().enumerate().map(block).collect()).unwrap()
    }

    pub(super) fn host_page(&self, block: usize, page: u64) -> PageRun {
        let host = self.blocks[block].1;
        PageRun { block: BlockIndex(block as u32), first: PageIndex(page / host * host), pages: host }
    }
}
