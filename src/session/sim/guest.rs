//! The guest: its memory on both sides, and its writers.

mod dirty_log;
mod machine;
mod watcher;

use std::sync::Arc;

use super::device::{Nothing, nothing_at_start};
use super::plan::{Plan, Rng, Side};
use super::world::{Mark, Sim, World};
use crate::guest::{GuestError, GuestMemory, MappedGuest};
use crate::ram::{BlockName, Landing, RamBlock, RamBlockTable};
use crate::session::{Error, Incoming, MemoryProvider};
use crate::sys::{HostRegion, HostSpan, Mapping};
use crate::units::{BlockIndex, PageSize};

pub(super) use dirty_log::{LogState, SimLog};
pub(super) use machine::SimControl;
pub(super) use watcher::Watcher;

pub(super) const PAGE: usize = 4096;

/// Both copies of the guest, and what each must hold.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory: [Arc<MappedGuest>; 2],
    /// What the guest has written, block by block; of the destination from the moment it runs there.
    pub(super) truth: [Vec<Vec<u8>>; 2],
    pub(super) running: [bool; 2],
    pub(super) writes_left: u64,
    stamp: u64,
    /// The device state as it was saved, and the position of the byte that ends it.
    pub(super) state: Vec<u8>,
    pub(super) state_end: usize,
    pub(super) loaded: Vec<u8>,
    /// It has promised to give no page back.
    pub(super) promised: bool,
    /// Pages without contents, of each side as `truth`.
    pub(super) nothing: [Nothing; 2],
}

/// Memory of its own, but for the block that `other` shares.
fn mapped(plan: &Plan, other: Option<&MappedGuest>) -> Arc<MappedGuest> {
    let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
    for (index, (pages, _)) in plan.blocks.iter().enumerate() {
        let shared = other.filter(|_| plan.ignored == Some(index as u32));
        let shared = shared.and_then(|other| other.region(BlockIndex(index as u32)).cloned());
        let own = || match plan.passed.contains(&(index as u32)) {
            true => Mapping::memfd("sim", pages * PAGE as u64).unwrap().region().clone(),
            false => Mapping::anonymous(pages * PAGE as u64).unwrap().region().clone(),
        };
        let name = BlockName::new(&format!("block{index}")).unwrap();
        builder = builder.region(RamBlock::new(name, pages * PAGE as u64), shared.unwrap_or_else(own));
    }
    Arc::new(builder.build().unwrap())
}

fn page_of(memory: &MappedGuest, block: u32, page: u64) -> HostSpan<'_> {
    memory.region(BlockIndex(block)).unwrap().span(page * PAGE as u64, PAGE as u64).unwrap()
}

impl Guest {
    /// A guest that runs at the source, its pages written or zero.
    pub(super) fn new(plan: &Plan) -> Self {
        let empty: Vec<_> = plan.blocks.iter().map(|(pages, _)| vec![0; *pages as usize * PAGE]).collect();
        let source = mapped(plan, None);
        let mut guest = Self {
            memory: [source.clone(), mapped(plan, Some(&source))],
            nothing: [nothing_at_start(plan), Nothing::default()],
            truth: [empty, Vec::new()],
            running: [true, false],
            writes_left: plan.writes,
            stamp: 0,
            state: Vec::new(),
            state_end: 0,
            loaded: Vec::new(),
            promised: false,
        };
        let mut rng = Rng::new(plan.seed ^ 0xf111);
        for (block, (pages, _)) in plan.blocks.iter().enumerate() {
            for page in (0..*pages).filter(|_| !rng.one_in(plan.zero_every)).collect::<Vec<_>>() {
                guest.write(Side::Source, block as u32, page, &mut rng);
            }
        }
        for (block, page) in &plan.unplugged {
            guest.spoil(*block, *page);
        }
        guest.use_target(plan);
        guest
    }

    /// The destination's memory keeps its previous contents.
    fn use_target(&self, plan: &Plan) {
        let mut rng = Rng::new(plan.seed ^ 0x01d);
        for (block, (pages, _)) in plan.blocks.iter().enumerate().filter(|_| plan.used_every > 0) {
            let block = block as u32;
            for page in (0..*pages).filter(|_| plan.ignored != Some(block)) {
                if rng.one_in(plan.used_every) {
                    page_of(&self.memory[1], block, page).copy_from(&[0xab; PAGE]);
                }
            }
        }
    }

    /// The same guest for a second migration; into the same memory where the first one's was discarded, or into new.
    pub(super) fn again(self, plan: &Plan, same_memory: bool) -> Self {
        let [source, target] = self.memory;
        let [truth, _] = self.truth;
        let target = if same_memory { target } else { mapped(plan, Some(&source)) };
        let memory = [source, target];
        Self { memory, truth: [truth, Vec::new()], writes_left: plan.writes, loaded: Vec::new(), ..self }
    }

    /// One store of the guest: a stamp somewhere in the page, or the page becomes zero.
    fn write(&mut self, side: Side, block: u32, page: u64, rng: &mut Rng) {
        self.stamp += 1;
        let span = page_of(&self.memory[side as usize], block, page);
        let start = page as usize * PAGE;
        let truth = &mut self.truth[side as usize][block as usize][start..start + PAGE];
        if self.nothing[side as usize].free.remove(&(block, page)) {
            // A guest that takes a free page overwrites all that was there.
            truth.fill(self.stamp as u8 | 1);
            span.copy_from(truth);
            return;
        }
        if rng.one_in(10) {
            span.fill_zero();
            truth.fill(0);
            return;
        }
        let at = rng.below(PAGE as u64 / 8) as usize * 8;
        let stamp = (self.stamp << 16 | 1).to_le_bytes();
        span.part(at, 8).unwrap().copy_from(&stamp);
        truth[at..at + 8].copy_from_slice(&stamp);
    }

    /// A page of the source's memory that is there and was never written.
    pub(super) fn make_zero(&mut self, block: u32, page: u64) {
        let start = page as usize * PAGE;
        self.truth[Side::Source as usize][block as usize][start..start + PAGE].fill(0);
        page_of(&self.memory[Side::Source as usize], block, page).fill_zero();
    }

    /// A page of the source's memory has no contents that anything may rely on.
    pub(super) fn spoil(&mut self, block: u32, page: u64) {
        page_of(&self.memory[Side::Source as usize], block, page).copy_from(&[0xdd; PAGE]);
    }

    /// The guest gives a page back; where it looks next is a new one of zeros. Returns what the old one held.
    fn give_back(&mut self, block: u32, page: u64) -> Vec<u8> {
        let start = page as usize * PAGE;
        let truth = &mut self.truth[Side::Source as usize][block as usize][start..start + PAGE];
        let held = truth.to_vec();
        truth.fill(0);
        page_of(&self.memory[Side::Source as usize], block, page).fill_zero();
        held
    }

    /// The first page whose bytes are not those the guest wrote last.
    pub(super) fn differs(&self, side: Side, truth: Side) -> Option<String> {
        let mut now = vec![0; PAGE];
        let nothing = &self.nothing[truth as usize];
        for (block, truth) in self.truth[truth as usize].iter().enumerate() {
            for (page, truth) in truth.chunks(PAGE).enumerate() {
                if nothing.has((block as u32, page as u64)) {
                    continue;
                }
                page_of(&self.memory[side as usize], block as u32, page as u64).copy_to(&mut now);
                if now != truth {
                    return Some(format!(
                        "page {page} of block{block} at {side:?} is not what the guest wrote"
                    ));
                }
            }
        }
        None
    }
}

impl World {
    /// The guest has moved away, and its former host uses the memory for something else.
    pub(super) fn reuse_memory(&mut self) {
        let marked_passed = self.marks.contains(&Mark::Passed);
        for (block, (pages, _)) in self.plan.blocks.iter().enumerate() {
            let is_there = marked_passed && self.plan.passed.contains(&(block as u32));
            if self.plan.ignored != Some(block as u32) && !is_there {
                let region =
                    self.guest.memory[Side::Source as usize].region(BlockIndex(block as u32)).unwrap();
                let span = region.span(0, pages * PAGE as u64).unwrap();
                span.copy_from(&vec![0xee; span.len()]);
            }
        }
    }

    /// The guest runs for a moment, wherever it runs.
    pub(super) fn guest_writes(&mut self) {
        let every = self.plan.write_every;
        for side in [Side::Source, Side::Target] {
            if !self.guest.running[side as usize] || self.guest.writes_left == 0 || !self.rng.one_in(every) {
                continue;
            }
            for _ in 0..1 + self.rng.below(3) {
                let at = self.rng.below(self.plan.working_set.len() as u64) as usize;
                let (block, page) = self.plan.working_set[at];
                self.guest.writes_left = self.guest.writes_left.saturating_sub(1);
                let shared = side == Side::Target && self.plan.ignored == Some(block);
                let nothing = &self.guest.nothing[side as usize];
                if shared || nothing.unplugged.contains(&(block, page)) || self.device.holds((block, page)) {
                    continue;
                }
                if nothing.free.contains(&(block, page)) {
                    self.mark(Mark::Reused);
                }
                let balloon = side == Side::Source && self.link.registers() && !self.guest.promised;
                if balloon && self.rng.one_in(4) {
                    let held = self.guest.give_back(block, page);
                    self.link.given_back(block, page, held);
                    self.mark(Mark::GivenBack);
                } else {
                    self.guest.write(side, block, page, &mut self.rng);
                }
                if side == Side::Source {
                    // vCPUs and devices are seen by different logs.
                    let log = self.rng.below(self.logs.len() as u64) as usize;
                    self.logs[log].wrote(block, page);
                    self.device.wrote((block, page));
                }
            }
        }
    }
}

impl World {
    /// A session accesses memory. Passed memory must not be accessed: it is the source's until COMMIT and the
    /// destination's after it.
    fn touched_at(&mut self, side: Side, block: BlockIndex) {
        if self.marks.contains(&Mark::Passed) && self.plan.passed.contains(&block.0) {
            self.violation(format!("{side:?} touches block {} although its memory is passed", block.0));
        }
    }

    /// A VMM that loads device state writes to guest memory.
    fn load_touches(&mut self) {
        let is_ours = self.commit_read;
        if !self.marks.contains(&Mark::Passed) {
            return;
        }
        let plan = Arc::clone(&self.plan);
        for block in &plan.passed {
            page_of(&self.guest.memory[Side::Target as usize], *block, 0).copy_from(&[0x77; 8]);
            if is_ours {
                self.guest.truth[Side::Source as usize][*block as usize][..8].fill(0x77);
            }
        }
    }
}

/// The destination's memory: its own, and what the source passes.
pub(super) struct SimProvider(pub(super) Sim);

impl MemoryProvider for SimProvider {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        let mut world = self.0.world();
        for (_, block, region) in world.guest.memory[Side::Target as usize].regions() {
            let passed = incoming.passed.iter().find(|passed| *passed.name() == block.name);
            let passed = passed.map(|passed| passed.map().unwrap().region().clone());
            builder = builder.region(block.clone(), passed.unwrap_or_else(|| region.clone()));
        }
        world.guest.memory[Side::Target as usize] = Arc::new(builder.build().unwrap());
        if !incoming.passed.is_empty() {
            world.mark(Mark::Passed);
        }
        drop(world);
        SimMemory::new(&self.0, Side::Target).provide(incoming)
    }
}

/// The memory of one side as a session sees it.
pub(super) struct SimMemory {
    sim: Sim,
    side: Side,
    inner: Arc<MappedGuest>,
    table: RamBlockTable,
}

impl SimMemory {
    pub(super) fn new(sim: &Sim, side: Side) -> Arc<Self> {
        let world = sim.world();
        let inner = Arc::clone(&world.guest.memory[side as usize]);
        let mut blocks = inner.table().blocks().to_vec();
        for (index, (block, (_, host_page))) in blocks.iter_mut().zip(&world.plan.blocks).enumerate() {
            block.host_page = *host_page;
            block.flags.ignored = world.plan.ignored == Some(index as u32);
        }
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks).unwrap();
        Arc::new(Self { sim: sim.clone(), side, inner, table })
    }
}

impl GuestMemory for SimMemory {
    fn table(&self) -> &RamBlockTable {
        &self.table
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        self.sim.device_acts(self.side);
        let mut turn = self.sim.enter();
        if self.side == Side::Source {
            turn.world.read(landing);
        }
        turn.world.touched_at(self.side, landing.block());
        drop(turn);
        self.inner.span(landing)
    }

    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        let passed = self.sim.world().plan.passed.contains(&block.0);
        self.inner.region(block).filter(|_| passed).cloned()
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.sim.world().touched_at(self.side, landing.block());
        self.inner.discard(landing)
    }
}
