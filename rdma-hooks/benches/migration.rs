//! How fast does memory migrate over this host's verbs device, and what does it cost?
//!
//! Both ends run in this process, over the device's own address. Prints one line per mode: throughput in guest memory
//! from the first page to the last completion, then per GB of guest memory the source thread's user and system CPU
//! time, posted requests (writes and messages), doorbells and sleeps. A device without kernel bypass, such as soft-RoCE,
//! takes a system call per doorbell, and about four per sleep. Compare with `ib_write_bw --size=1048576` on the same
//! device; figures of an emulated device mean something only as ratios.
//!
//! `cargo bench -p rdma-hooks --bench migration -- [MIB [REPEATS [PERCENT OF PAGES FILLED [MODE]]]]`

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
        user: f64,
        system: f64,
        counters: Counters,
    }

    pub(super) fn run() {
        let arguments: Vec<u64> = std::env::args().skip(1).filter_map(|text| text.parse().ok()).collect();
        let mib = arguments.first().copied().unwrap_or(128);
        let repeats = arguments.get(1).copied().unwrap_or(3);
        let filled = arguments.get(2).copied().unwrap_or(100);
        let only = std::env::args().nth(4);
        let address = match address() {
            Ok(address) => address,
            Err(why) => return println!("skipped: {why}"),
        };
        let extension = |data_queues| {
            let migration = MigrationId([5; 16]);
            Some(ExtensionOffer { data_queues, window: 8, features: Features::ALL, migration })
        };
        let base = SourceConfig::default;
        let modes = [
            ("dynamic", base()),
            ("pin-all", SourceConfig { pin_all: true, ..base() }),
            ("native", SourceConfig { extension: extension(0), ..base() }),
            ("native-pin-all", SourceConfig { pin_all: true, extension: extension(0), ..base() }),
            ("native-pin-all-4", SourceConfig { pin_all: true, extension: extension(3), ..base() }),
        ];
        let memory = Arc::new(random_memory(mib * MIB, filled));
        // Nobody has looked at a guest that is mostly zero; random memory needs no look.
        let content = if filled < 100 { PageContent::Unknown } else { PageContent::Data };
        for _ in 0..repeats {
            for (name, config) in &modes {
                if only.as_ref().is_none_or(|only| only == name) {
                    report(name, mib, &migrate(&address, &memory, config.clone(), content));
                }
            }
        }
    }

    fn report(name: &str, mib: u64, measured: &Measured) {
        let Measured { seconds, user, system, counters } = measured;
        let gb = (mib * MIB) as f64 / 1e9;
        let per_gb = |count: u64| count as f64 / gb;
        println!(
            "{name:16} {:8.2} MB/s | per GB: {:6.3} s user, {:6.2} s system, {:7.0} requests ({:6.0} writes), \
             {:6.0} signalled, {:6.0} doorbells, {:6.0} sleeps | {:5.1} MB written, {} zero ranges",
            gb * 1e3 / seconds,
            user / gb,
            system / gb,
            per_gb(counters.writes_posted + counters.messages_sent),
            per_gb(counters.writes_posted),
            per_gb(counters.writes_signalled),
            per_gb(counters.doorbells),
            per_gb(counters.waits),
            counters.bytes_written as f64 / 1e6,
            counters.zero_ranges,
        );
    }

    fn random_memory(len: u64, filled: u64) -> Mapped {
        let memory = Mapped::zeros(len);
        let mut random = Random(1);
        for offset in (0..len).step_by(4096) {
            if random.below(100) < filled {
                memory.write(offset, &random.next().to_le_bytes().repeat(512));
            }
        }
        memory
    }

    fn migrate(address: &str, memory: &Arc<Mapped>, config: SourceConfig, content: PageContent) -> Measured {
        let (from, to) = (VerbsFabric::open().unwrap(), VerbsFabric::open().unwrap());
        let stop = Stop::new(Some(from.now() + Duration::from_secs(300)), Cancel::default());
        let target = Arc::new(Mapped::zeros(memory.len()));
        let mut listener = to.listen(address, 0).unwrap();
        let port = listener.port();
        let measured = std::thread::scope(|scope| {
            let there = scope.spawn(|| {
                let config = DestinationConfig { data_queues: 3, window: 8, ..DestinationConfig::default() };
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
                        let span = BlockSpan { block: 0, offset, len, content };
                        hooks.control_save_page(span, &stop).unwrap();
                    }
                }
                hooks.registration_stop(kind, &stop).unwrap();
            };
            round(&mut hooks, RamControl::Setup);
            let before = hooks.counters();
            let (started, cpu) = (Instant::now(), cpu_seconds());
            round(&mut hooks, RamControl::Finish);
            let (seconds, after) = (started.elapsed().as_secs_f64(), cpu_seconds());
            let (user, system) = (after.0 - cpu.0, after.1 - cpu.1);
            let counters = hooks.counters() - before;
            hooks.finish(&stop).unwrap();
            there.join().unwrap();
            Measured { seconds, user, system, counters }
        });
        assert_eq!(memory.difference(&target), None, "wrong answers are not worth timing");
        measured
    }

    /// User and system time of this thread, in hundredths of a second as the kernel counts them.
    fn cpu_seconds() -> (f64, f64) {
        let stat = fs::read_to_string("/proc/thread-self/stat").unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap() + 2..].split(' ').collect();
        (fields[11].parse::<f64>().unwrap() / 100.0, fields[12].parse::<f64>().unwrap() / 100.0)
    }
}

fn main() {
    #[cfg(feature = "verbs")]
    over_verbs::run();
    #[cfg(not(feature = "verbs"))]
    println!("skipped: built without the verbs feature");
}
