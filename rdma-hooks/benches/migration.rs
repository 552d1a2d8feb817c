//! How fast does random memory migrate over this host's verbs device, and what does it cost?
//!
//! Both ends run in this process, over the device's own address. Prints one line per mode: throughput from the first
//! page to the last completion, this process's CPU time (both ends), requests, doorbells and sleeps. Compare with
//! `ib_write_bw --size=1048576` on the same device; figures of an emulated device mean something only as ratios.
//!
//! `cargo bench -p rdma-hooks --bench migration -- [MIB] [REPEATS]`

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/common/mod.rs"]
mod common;

#[cfg(feature = "verbs")]
mod over_verbs {
    use std::fs;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use rdma_hooks::verbs::VerbsFabric;
    use rdma_hooks::{
        BlockSpan, Cancel, Counters, DestinationConfig, DestinationHooks, ExtensionOffer, Fabric, Features,
        HostRegion, MigrationId, PageContent, RamBlock, RamControl, RegionMemory, SourceConfig, SourceHooks,
        Stop,
    };

    use super::common::device::address;
    use super::common::mapped::Mapped;
    use super::common::{MIB, Random, TestMemory};

    struct Measured {
        seconds: f64,
        cpu: f64,
        counters: Counters,
    }

    pub(super) fn run() {
        let arguments: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
        let mib = arguments.first().copied().unwrap_or(128);
        let repeats = arguments.get(1).copied().unwrap_or(3);
        let address = match address() {
            Ok(address) => address,
            Err(why) => return println!("skipped: {why}"),
        };
        let extension = Some(ExtensionOffer {
            data_queues: 3,
            window: 4,
            features: Features::ALL,
            migration: MigrationId([5; 16]),
        });
        let modes = [
            ("dynamic", SourceConfig::default()),
            ("pin-all", SourceConfig { pin_all: true, ..SourceConfig::default() }),
            ("pin-all, 4 queue pairs", SourceConfig { pin_all: true, extension, ..SourceConfig::default() }),
        ];
        let memory = Arc::new(random_memory(mib * MIB));
        for _ in 0..repeats {
            for (name, config) in &modes {
                let measured = migrate(&address, &memory, config.clone());
                let Measured { seconds, cpu, counters } = measured;
                println!(
                    "{name:24} {:8.2} MiB/s  {cpu:6.2} CPU s  {} writes, {} signalled, {} doorbells, {} waits",
                    mib as f64 / seconds,
                    counters.writes_posted,
                    counters.writes_signalled,
                    counters.doorbells,
                    counters.waits,
                );
            }
        }
    }

    fn random_memory(len: u64) -> Mapped {
        let memory = Mapped::zeros(len);
        let mut random = Random(1);
        for offset in (0..len).step_by(4096) {
            memory.write(offset, &random.next().to_le_bytes().repeat(512));
        }
        memory
    }

    fn migrate(address: &str, memory: &Arc<Mapped>, config: SourceConfig) -> Measured {
        let (from, to) = (VerbsFabric::open().unwrap(), VerbsFabric::open().unwrap());
        let stop = Stop::new(Some(from.now() + Duration::from_secs(300)), Cancel::default());
        let target = Arc::new(Mapped::zeros(memory.len()));
        let mut listener = to.listen(address, 0).unwrap();
        let port = listener.port();
        let measured = std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                let config = DestinationConfig { data_queues: 3, window: 4, ..DestinationConfig::default() };
                let mut hooks = DestinationHooks::accept(listener.as_mut(), &config, &stop).unwrap();
                hooks.add_block(RamBlock::new("ram", HostRegion::new(target.clone()))).unwrap();
                hooks.block_notification("ram", target.len()).unwrap();
                for _ in 0..2 {
                    let mut mark = [0; 8];
                    let mut done = 0;
                    while done < 8 {
                        done += hooks.read_stream(&mut mark[done..], &stop).unwrap();
                    }
                    hooks.registration_handle(&stop).unwrap();
                }
                hooks.finish(&stop).unwrap();
            });
            let mut hooks = SourceHooks::connect(&from, address, port, config, &stop).unwrap();
            hooks.set_blocks(vec![RamBlock::new("ram", HostRegion::new(memory.clone()))]).unwrap();
            let round = |hooks: &mut SourceHooks, kind| {
                let mark = hooks.registration_start(kind).unwrap().unwrap();
                hooks.write_stream(&mark.to_bytes(), &stop).unwrap();
                if kind == RamControl::Finish {
                    for offset in (0..memory.len()).step_by(2 << 20) {
                        let len = (memory.len() - offset).min(2 << 20);
                        let span = BlockSpan { block: 0, offset, len, content: PageContent::Data };
                        hooks.control_save_page(span, &stop).unwrap();
                    }
                }
                hooks.registration_stop(kind, &stop).unwrap();
            };
            round(&mut hooks, RamControl::Setup);
            let (started, cpu) = (Instant::now(), cpu_seconds());
            round(&mut hooks, RamControl::Finish);
            let (seconds, cpu) = (started.elapsed().as_secs_f64(), cpu_seconds() - cpu);
            let counters = hooks.counters();
            hooks.finish(&stop).unwrap();
            there.join().unwrap();
            Measured { seconds, cpu, counters }
        });
        assert_eq!(memory.difference(&target), None, "wrong answers are not worth timing");
        measured
    }

    /// User and system time of this process, in hundredths of a second as the kernel counts them.
    fn cpu_seconds() -> f64 {
        let stat = fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }
}

fn main() {
    #[cfg(feature = "verbs")]
    over_verbs::run();
    #[cfg(not(feature = "verbs"))]
    println!("skipped: built without the verbs feature");
}
