//! The guest: its memory on both sides, who writes to it and which logs see it.

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::device::{Nothing, nothing_at_start};
use super::plan::{Fault, LogKind, Plan, Rng, Side, Started};
use super::world::{Mark, Sim, World};
use crate::guest::{
    DeviceState, DirtyError, DirtySource, GuestControl, GuestError, GuestMemory, MappedGuest, PageObserver,
};
use crate::ram::{BlockName, Landing, PageBitmap, PageRun, RamBlock, RamBlockTable};
use crate::session::{Arrival, Error, Incoming};
use crate::stream::qemu::section::{
    SectionName, encode_eof, encode_footer, encode_full, encode_vm_description,
};
use crate::sys::{HostSpan, Mapping};
use crate::units::{BlockIndex, PageIndex, PageSize, Percent};

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
    /// The device state as it was saved, and where the byte that ends it stands.
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
        let own = || Mapping::anonymous(pages * PAGE as u64).unwrap().region().clone();
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

    /// The destination's memory holds what was there before.
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
            // Whoever takes a free page leaves nothing of what was there.
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

    /// A page of the source's memory has nothing in it that anybody may rely on.
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
    /// The guest has gone, and whoever had its memory uses it for something else.
    pub(super) fn reuse_memory(&mut self) {
        for (block, (pages, _)) in self.plan.blocks.iter().enumerate() {
            if self.plan.ignored != Some(block as u32) {
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
    /// An unplugged page that something is in at the destination, where a ramwire was told of it.
    fn stale_page(&self) -> Option<(u32, u64)> {
        if !self.ready || self.plan.watched {
            return None;
        }
        let mut now = vec![0; PAGE];
        self.guest.nothing[0].unplugged.iter().copied().find(|(block, page)| {
            page_of(&self.guest.memory[1], *block, *page).copy_to(&mut now);
            now.iter().any(|byte| *byte != 0)
        })
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
        drop(turn);
        self.inner.span(landing)
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.inner.discard(landing)
    }
}

/// A dirty log.
#[derive(Debug)]
pub(super) struct LogState {
    kind: LogKind,
    pub(super) on: bool,
    written: Vec<PageBitmap>,
    /// What was read and not cleared, or what was taken when the sync began.
    read: Vec<PageBitmap>,
}

impl LogState {
    pub(super) fn new(kind: LogKind, plan: &Plan) -> Self {
        let empty: Vec<_> = plan.blocks.iter().map(|(pages, _)| PageBitmap::new(*pages)).collect();
        Self { kind, on: false, written: empty.clone(), read: empty }
    }

    pub(super) fn wrote(&mut self, block: u32, page: u64) {
        if self.on {
            self.written[block as usize].set_range(page..page + 1);
        }
    }
}

fn or(from: &PageBitmap, into: &mut PageBitmap) {
    into.merge_words(0, from.words());
}

/// The handle of one log.
pub(super) struct SimLog {
    pub(super) sim: Sim,
    pub(super) index: usize,
}

impl SimLog {
    /// One call, which is a step, and fails if the plan says so.
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
            // Only what was read is cleared: a page written since for the first time is not known yet.
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

/// The machine around one side's memory.
pub(super) struct SimControl {
    pub(super) sim: Sim,
    pub(super) side: Side,
}

fn failed<T>(world: &mut World) -> io::Result<T> {
    assert!(!world.panics(), "as the plan wants it");
    Err(io::Error::other("as the plan wants it"))
}

impl SimControl {
    fn may_resume(&self, world: &mut World) {
        if world.guest.running[self.side.other() as usize] {
            world.violation(format!(
                "the guest is started at {:?} while it runs on the other side",
                self.side
            ));
        }
        if self.side == Side::Source {
            if world.commit.is_some() && !world.refused {
                world.violation("the source's guest was resumed after COMMIT");
            }
        } else {
            let heard = world.commit.is_some_and(|end| world.pipes[0].read >= end);
            if !heard {
                world.violation("the destination's guest was started before COMMIT was heard");
            }
            if let Some(page) = world.stale_page() {
                world.violation(format!("{page:?} is unplugged and has an earlier state"));
            }
            if world.guest.loaded != world.guest.state {
                world.violation("the guest is started with another device state");
            }
        }
        if let Some(page) = world.guest.differs(self.side, Side::Source) {
            world.violation(format!("started with other memory: {page}"));
        }
    }
}

impl GuestControl for SimControl {
    fn pause(&mut self) -> io::Result<()> {
        let mut turn = self.sim.enter();
        if self.side == Side::Target {
            // Stopped again: its start panicked.
            if turn.world.plan.started == Started::RunsOn {
                return Err(io::Error::other("as the plan wants it"));
            }
            turn.world.guest.running[1] = false;
            return Ok(());
        }
        turn.world.pause_begins();
        if turn.world.fails(|fault| matches!(fault, Fault::Pause { .. })) {
            let stands = turn.world.plan.fault == Some(Fault::Pause { stands: true });
            turn.world.guest.running[0] = !stands;
            return failed(&mut turn.world);
        }
        turn.world.guest.running[0] = false;
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        let mut turn = self.sim.enter();
        if self.side == Side::Target && turn.world.killed {
            return Err(io::Error::other("its host is dead"));
        }
        self.may_resume(&mut turn.world);
        let side = self.side;
        let stands_still = side == Side::Source && turn.world.plan.stands_still;
        let fails = side == Side::Target && turn.world.fails(|fault| *fault == Fault::Start);
        let may_run = turn.world.plan.panics && turn.world.plan.started != Started::Not;
        if stands_still || fails && !may_run {
            return failed(&mut turn.world);
        }
        turn.world.guest.running[side as usize] = true;
        if side == Side::Target {
            turn.world.guest.truth[1] = turn.world.guest.truth[0].clone();
            turn.world.guest.nothing[1] = turn.world.guest.nothing[0].clone();
            // Enough to see a page that is placed too late.
            turn.world.guest.writes_left += 40;
        }
        if fails {
            return failed(&mut turn.world);
        }
        turn.step();
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    fn forbid_discard(&mut self, forbid: bool) -> bool {
        let mut turn = self.sim.enter();
        if !forbid && turn.world.link.registered && self.side == Side::Source {
            turn.world.violation("the promise is given back while a NIC knows the memory");
        }
        turn.world.guest.promised = forbid;
        true
    }

    fn throttle(&mut self, share: Percent) {
        self.sim.enter().world.throttle = share.get();
    }
}

impl DeviceState for SimControl {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let mut turn = self.sim.enter();
        if turn.world.guest.running[0] {
            turn.world.violation("device state was saved of a running guest");
        }
        if turn.world.fails(|fault| *fault == Fault::Save) {
            return failed(&mut turn.world);
        }
        let mut payload = turn.world.guest.stamp.to_be_bytes().to_vec();
        for _ in 0..turn.world.plan.state_bytes {
            payload.push(turn.world.rng.next() as u8);
        }
        let (state, end) = device_state(&payload);
        out.write_all(&state)?;
        (turn.world.guest.state, turn.world.guest.state_end) = (state, end);
        Ok(())
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut turn = self.sim.enter();
        turn.world.guest.loaded.clear();
        from.read_to_end(&mut turn.world.guest.loaded)?;
        if turn.world.killed || turn.world.fails(|fault| *fault == Fault::Load) {
            return failed(&mut turn.world);
        }
        Ok(())
    }
}

/// One device section with its description, as a QEMU would end its stream; and where the sections end.
fn device_state(payload: &[u8]) -> (Vec<u8>, usize) {
    let mut out = Vec::new();
    encode_full(&SectionName { id: 9, idstr: "dev", instance: 0, version: 1 }, &mut out);
    out.extend_from_slice(payload);
    encode_footer(9, &mut out);
    let end = out.len();
    encode_eof(&mut out);
    let json = format!(
        r#"{{"devices": [{{"name": "dev", "instance_id": 0, "vmsd_name": "d", "fields": [{{"size": {}}}]}}]}}"#,
        payload.len()
    );
    encode_vm_description(json.as_bytes(), &mut out);
    (out, end)
}

/// Copies each page the moment it is said to be there, as a relay may.
pub(super) struct Watcher {
    pub(super) sim: Sim,
    copies: Arc<Copies>,
}

struct Copies {
    sim: Sim,
    pages: Mutex<Vec<Vec<Option<Vec<u8>>>>>,
}

impl Watcher {
    pub(super) fn new(sim: &Sim) -> Self {
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

impl Arrival for Watcher {
    fn watch(&mut self, _memory: &Arc<dyn GuestMemory>) -> Arc<dyn PageObserver> {
        Arc::clone(&self.copies) as Arc<dyn PageObserver>
    }

    fn began(&mut self, _incoming: &Incoming, _memory: &Arc<dyn GuestMemory>) -> Result<(), Error> {
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
