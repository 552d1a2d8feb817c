//! A tiny VMM for tests: a few RAM blocks, a guest that writes while it is migrated, and a byte stream just rich
//! enough to announce blocks and rounds.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_hooks::sim::{Fault, Host, Part, Sim, SimConfig, SparseMemory};
use rdma_hooks::{
    BlockSpan, Cancel, DestinationConfig, DestinationHooks, Fabric, Features, HookMark, HooksError,
    HostRegion, PageContent, RamBlock, RamControl, RegionMemory, SourceConfig, SourceHooks, Stop, Ticket,
};

pub mod device;
pub mod fuzz_bodies;
pub mod mapped;
pub mod pair;
pub mod scripted;

pub const PAGE: u64 = 4096;
pub const MIB: u64 = 1 << 20;
pub const PORT: u16 = 4444;

/// splitmix64: the same seed gives the same guest.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// Memory a test can make and compare.
pub trait TestMemory: RegionMemory + 'static {
    fn zeros(len: u64) -> Self;
    fn difference(&self, other: &Self) -> Option<u64>;
}

impl TestMemory for SparseMemory {
    fn zeros(len: u64) -> Self {
        Self::new(len)
    }

    fn difference(&self, other: &Self) -> Option<u64> {
        self.first_difference(other)
    }
}

/// One host's RAM.
pub struct Ram<M>(pub Vec<(&'static str, Arc<M>)>);

impl<M> Clone for Ram<M> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<M: TestMemory> Ram<M> {
    /// Four blocks: several chunks, a chunk and a bit, one page, exactly two chunks.
    pub fn zeros() -> Self {
        let block = |name, len| (name, Arc::new(M::zeros(len)));
        Self(vec![
            block("pc.ram", 9 * MIB + 3 * PAGE),
            block("pc.rom", MIB + PAGE),
            block("acpi", PAGE),
            block("vga.vram", 2 * MIB),
        ])
    }

    pub fn blocks(&self) -> Vec<RamBlock> {
        self.0.iter().map(|(name, memory)| RamBlock::new(*name, HostRegion::new(memory.clone()))).collect()
    }

    pub fn first_difference(&self, other: &Self) -> Option<(&'static str, u64)> {
        self.0
            .iter()
            .zip(&other.0)
            .find_map(|((name, ours), (_, theirs))| ours.difference(theirs).map(|offset| (*name, offset)))
    }
}

/// A guest that writes: fills pages, clears pages, and tells which it touched.
pub struct Guest<M> {
    pub ram: Ram<M>,
    pub random: Random,
}

impl<M: TestMemory> Guest<M> {
    pub fn new(seed: u64) -> Self {
        Self { ram: Ram::zeros(), random: Random(seed ^ 0x6775_6573_7400) }
    }

    /// Writes to some pages; returns them by block and page, in address order, each once.
    pub fn run(&mut self, writes: u64) -> Vec<(u32, u64)> {
        let mut dirty = std::collections::BTreeSet::new();
        for _ in 0..writes {
            let block = self.random.below(self.ram.0.len() as u64) as u32;
            let memory = &self.ram.0[block as usize].1;
            let page = self.random.below(memory.len() / PAGE);
            let run = 1 + self.random.below(6).min(memory.len() / PAGE - page - 1);
            for page in page..page + run {
                if self.random.chance(300) {
                    memory.zero(page * PAGE, PAGE);
                } else {
                    let value = self.random.next().to_le_bytes();
                    memory.write(page * PAGE + self.random.below(PAGE - 8), &value);
                }
                dirty.insert((block, page));
            }
        }
        dirty.into_iter().collect()
    }

    /// Every page there is.
    pub fn all(&self) -> Vec<(u32, u64)> {
        let pages = |(block, (_, memory)): (usize, &(&str, Arc<M>))| {
            (0..memory.len() / PAGE).map(move |page| (block as u32, page)).collect::<Vec<_>>()
        };
        self.ram.0.iter().enumerate().flat_map(pages).collect()
    }
}

/// Joins pages to spans, as a page search does; some with their content known.
pub fn spans<M: TestMemory>(pages: &[(u32, u64)], guest: &Guest<M>, random: &mut Random) -> Vec<BlockSpan> {
    let mut spans: Vec<BlockSpan> = Vec::new();
    for &(block, page) in pages {
        let zero = guest.ram.0[block as usize].1.is_zero(page * PAGE, PAGE);
        let content = match (random.below(4), zero) {
            (0, _) => PageContent::Unknown,
            (_, true) => PageContent::Zero,
            (_, false) => PageContent::Data,
        };
        match spans.last_mut() {
            Some(last)
                if last.block == block
                    && last.offset + last.len == page * PAGE
                    && last.content == content
                    && !random.chance(50) =>
            {
                last.len += PAGE;
            }
            _ => spans.push(BlockSpan { block, offset: page * PAGE, len: PAGE, content }),
        }
    }
    spans
}

/// How a test migration goes.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub sim: SimConfig,
    pub source: SourceConfig,
    pub data_queues: u16,
    pub window: u16,
    pub features: Features,
    pub rounds: u64,
    /// How long the source holds back in each open round; only on a device, where time passes by itself.
    pub holds: Duration,
}

impl Plan {
    /// A plan drawn from a seed: every combination of modes comes up.
    pub fn from_seed(seed: u64) -> Self {
        let mut random = Random(seed.wrapping_mul(0x5851_f42d_4c95_7f2d));
        let extended = random.chance(500);
        let source = SourceConfig {
            pin_all: random.chance(300),
            pin_budget_bytes: random.chance(400).then(|| (1 + random.below(6)) * MIB),
            max_span_chunks: 1 << random.below(5),
            zero_floor_bytes: random.below(20) * PAGE,
            extension: extended.then(|| rdma_hooks::ExtensionOffer {
                data_queues: random.below(4) as u16,
                window: 1 + random.below(4) as u16,
                features: features(&mut random),
                migration: rdma_hooks::MigrationId(random.next().to_le_bytes().repeat(2).try_into().unwrap()),
            }),
            record_latencies: random.chance(100),
            ..SourceConfig::default()
        };
        let sim = SimConfig {
            seed,
            loss_per_mille: if random.chance(300) { random.below(100) } else { 0 },
            send_depth: 2 + random.below(40) as usize,
            ..SimConfig::default()
        };
        let (data_queues, window) = (random.below(4) as u16, random.below(5) as u16);
        let (features, rounds) = (features(&mut random), random.below(4));
        Self { sim, source, data_queues, window, features, rounds, holds: Duration::ZERO }
    }

    /// The same plan with something going wrong.
    pub fn with_fault(mut self, host: Host, fault: Fault) -> Self {
        self.sim.faults.push((host, fault));
        self
    }
}

fn features(random: &mut Random) -> Features {
    let (key_batches, zero_runs) = (random.chance(700), random.chance(700));
    Features { key_batches, zero_runs, keepalives: key_batches || zero_runs, reads: false }
}

/// What a migration came to.
pub struct Outcome {
    pub source: Result<(), HooksError>,
    pub destination: Result<(), HooksError>,
    pub sim: Sim,
    pub from: Ram<SparseMemory>,
    pub to: Ram<SparseMemory>,
    pub counters: rdma_hooks::Counters,
}

/// A migration over the simulated fabric, both ends in threads.
pub fn migrate(plan: &Plan) -> Outcome {
    let sim = Sim::new(plan.sim.clone());
    let (from, to) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let mut guest = Guest::<SparseMemory>::new(plan.sim.seed);
    let source_ram = guest.ram.clone();
    let target_ram = Ram::<SparseMemory>::zeros();
    // What the destination held before must not matter.
    target_ram.0[0].1.write(5 * PAGE, b"left over");
    let listener = to.listen("sim", PORT).unwrap();
    std::thread::scope(|scope| {
        let part: Part = to.enter();
        let target = target_ram.clone();
        let destination = scope.spawn(move || {
            let _part = part;
            receive(&to, listener, &target, plan)
        });
        let part = from.enter();
        let source = scope.spawn(move || {
            let _part = part;
            let mut counters = rdma_hooks::Counters::default();
            let sent = send(&from, "sim", PORT, &mut guest, plan, &mut counters);
            (sent, counters)
        });
        let (source, counters) = source.join().expect("source thread");
        let destination = destination.join().expect("destination thread");
        Outcome { source, destination, sim, from: source_ram, to: target_ram, counters }
    })
}

fn minute(fabric: &dyn Fabric) -> Stop {
    Stop::new(Some(fabric.now() + Duration::from_secs(60)), Cancel::default())
}

pub fn send<M: TestMemory>(
    fabric: &dyn Fabric,
    host: &str,
    port: u16,
    guest: &mut Guest<M>,
    plan: &Plan,
    counters: &mut rdma_hooks::Counters,
) -> Result<(), HooksError> {
    let stop = minute(fabric);
    let mut hooks = SourceHooks::connect(fabric, host, port, plan.source.clone(), &stop)?;
    let blocks = guest.ram.blocks();
    let mut head = vec![blocks.len() as u8];
    for block in &blocks {
        head.push(block.name.len() as u8);
        head.extend_from_slice(block.name.as_bytes());
        head.extend_from_slice(&block.region.len().to_be_bytes());
    }
    hooks.set_blocks(blocks)?;
    hooks.write_stream(&head, &stop)?;
    round(&mut hooks, RamControl::Setup, &[], Duration::ZERO, &stop)?;

    let mut random = Random(plan.sim.seed ^ 77);
    let mut dirty = guest.all();
    for index in 0..=plan.rounds {
        let last = index == plan.rounds;
        let kind = if last { RamControl::Finish } else { RamControl::Round };
        let spans = spans(&dirty, guest, &mut random);
        hooks.write_stream(&[if last { b'F' } else { b'R' }], &stop)?;
        round(&mut hooks, kind, &spans, plan.holds, &stop)?;
        if !last {
            dirty = guest.run(20);
        }
    }
    let devices = vec![0xd5; random.below(100_000) as usize];
    hooks.write_stream(&(devices.len() as u32).to_be_bytes(), &stop)?;
    hooks.write_stream(&devices, &stop)?;
    *counters = hooks.counters();
    if let Some(budget) = plan.source.pin_budget_bytes.filter(|_| !plan.source.pin_all) {
        assert!(hooks.registered_bytes() <= budget, "{} bytes pinned", hooks.registered_bytes());
    }
    assert!(hooks.finish(&stop)?, "the destination closes when it has everything");
    Ok(())
}

fn round(
    hooks: &mut SourceHooks,
    kind: RamControl,
    spans: &[BlockSpan],
    holds: Duration,
    stop: &Stop,
) -> Result<(), HooksError> {
    let mark = hooks.registration_start(kind)?.expect("no postcopy here");
    hooks.write_stream(&mark.to_bytes(), stop)?;
    let mut arrived = Ticket(0);
    for (index, span) in spans.iter().enumerate() {
        if index % 8 == 0 {
            hooks.expect_pages(&spans[index..(index + 8).min(spans.len())], stop)?;
        }
        hooks.control_save_page(*span, stop)?;
        if index % 8 == 7 {
            let now = hooks.collect()?;
            assert!(now >= arrived, "tickets only grow");
            arrived = now;
        }
    }
    let until = Instant::now() + holds;
    while Instant::now() < until {
        hooks.collect()?;
        std::thread::sleep(Duration::from_millis(5));
    }
    hooks.registration_stop(kind, stop)
}

pub fn receive<M: TestMemory>(
    fabric: &dyn Fabric,
    mut listener: Box<dyn rdma_hooks::fabric::Listener>,
    ram: &Ram<M>,
    plan: &Plan,
) -> Result<(), HooksError> {
    let stop = minute(fabric);
    let config = DestinationConfig {
        data_queues: plan.data_queues,
        window: plan.window,
        features: plan.features,
        silence: Some(Duration::from_secs(20)),
        admit: None,
    };
    let mut hooks = DestinationHooks::accept(listener.as_mut(), &config, &stop)?;
    for block in ram.blocks() {
        hooks.add_block(block)?;
    }
    let [count] = take::<1>(&mut hooks, &stop)?;
    for _ in 0..count {
        let [len] = take::<1>(&mut hooks, &stop)?;
        let mut name = vec![0; usize::from(len)];
        fill(&mut hooks, &mut name, &stop)?;
        let length = u64::from_be_bytes(take(&mut hooks, &stop)?);
        hooks.block_notification(std::str::from_utf8(&name).unwrap(), length)?;
    }
    mark(&mut hooks, &stop)?;
    let summary = hooks.registration_handle(&stop)?;
    assert!(summary.blocks_exchanged);
    loop {
        let [kind] = take::<1>(&mut hooks, &stop)?;
        mark(&mut hooks, &stop)?;
        hooks.registration_handle(&stop)?;
        if kind == b'F' {
            break;
        }
        assert_eq!(kind, b'R');
    }
    let mut devices = vec![0; u32::from_be_bytes(take(&mut hooks, &stop)?) as usize];
    fill(&mut hooks, &mut devices, &stop)?;
    assert!(devices.iter().all(|&byte| byte == 0xd5));
    hooks.revoke_all();
    // Everything is here; whether the farewell gets through changes nothing.
    let _ = hooks.finish(&stop);
    Ok(())
}

fn mark(hooks: &mut DestinationHooks, stop: &Stop) -> Result<(), HooksError> {
    assert_eq!(u64::from_be_bytes(take(hooks, stop)?), HookMark::FLAG);
    Ok(())
}

fn take<const N: usize>(hooks: &mut DestinationHooks, stop: &Stop) -> Result<[u8; N], HooksError> {
    let mut bytes = [0; N];
    fill(hooks, &mut bytes, stop)?;
    Ok(bytes)
}

fn fill(hooks: &mut DestinationHooks, into: &mut [u8], stop: &Stop) -> Result<(), HooksError> {
    let mut done = 0;
    while done < into.len() {
        done += hooks.read_stream(&mut into[done..], stop)?;
    }
    Ok(())
}
