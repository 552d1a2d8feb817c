//! `ChannelOptions::numa` and `--numa`: whether threads of page channels run on the configured nodes, and allocate
//! memory there.

use std::collections::BTreeSet;
use std::process::Command;
use std::sync::{Arc, Mutex};

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::{MappedGuest, TestMachine};
use ramwire::ram::{BlockName, RamBlock};
use ramwire::session::{
    DestinationGuest, DestinationSession, DestinationSettings, SourceGuest, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{
    CancelToken, Job, Mapping, Stop, nodes_of_pages, numa_nodes, own_cpus, set_cpu_affinity, spawn_thread,
};
use ramwire::transport::{AllowList, ChannelOptions, ConnectionOptions, Listener, Numa, open_source};
use ramwire::units::PageSize;

use crate::common::{Deadline, ramwire::Ramwire, scratch};

const PAGES: u64 = 4 << 8;
const CHANNELS: u8 = 4;

fn guest(mapping: &Mapping) -> Arc<MappedGuest> {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build().unwrap())
}

fn bytes(mapping: &Mapping) -> Vec<u8> {
    let mut bytes = vec![0; (PAGES * 4096) as usize];
    mapping.region().span(0, PAGES * 4096).unwrap().copy_to(&mut bytes);
    bytes
}

/// Nodes that hold more than a tenth of the pages. The kernel prefers the local node's memory but does not guarantee
/// it: on a machine that has run other tests before, single pages are on another node.
fn nodes(mapping: &Mapping) -> BTreeSet<u32> {
    let start = mapping.region().address();
    let addresses: Vec<usize> = (0..PAGES as usize).map(|page| start + page * 4096).collect();
    let nodes = nodes_of_pages(&addresses).unwrap();
    assert!(nodes.iter().all(Option::is_some), "every page has come");
    let count = |node: u32| nodes.iter().filter(|of_page| **of_page == Some(node)).count();
    let found: BTreeSet<u32> = nodes.iter().copied().flatten().collect();
    println!("pages by node: {:?}", found.iter().map(|node| (*node, count(*node))).collect::<Vec<_>>());
    found.into_iter().filter(|node| count(*node) > nodes.len() / 10).collect()
}

/// The affinity of each page channel's thread when its work was done, `tx` and `rx`.
type Seen = Arc<Mutex<Vec<(&'static str, Vec<u32>)>>>;

/// Threads as the standard library starts them, with a check of their final affinity. The embedder may have set an
/// affinity of its own before.
fn watched(seen: &Seen, count: u8, embedder: Option<Vec<u32>>, numa: &Numa) -> ConnectionOptions {
    let seen = Arc::clone(seen);
    let spawn = move |name: &'static str, job: Job| {
        let (seen, embedder) = (Arc::clone(&seen), embedder.clone());
        let job = move || {
            embedder.iter().for_each(|cpus| assert!(set_cpu_affinity(cpus).unwrap()));
            job();
            seen.lock().unwrap().push((&name[name.len() - 2..], own_cpus().unwrap()));
        };
        spawn_thread(name, Box::new(job))
    };
    let mut channels = ChannelOptions::default();
    channels.count = count;
    channels.numa = numa.clone();
    channels.spawn = Arc::new(spawn);
    let mut options = ConnectionOptions::default();
    options.channels = channels;
    options
}

/// Migrates `from` to `to` by `count` channels; returns where their threads ran.
fn migrate(from: &Mapping, to: &Mapping, count: u8, numa: &Numa, embedder: Option<Vec<u32>>) -> Seen {
    let seen = Seen::default();
    let options = watched(&seen, count, embedder, numa);
    let stop = Stop::on(&CancelToken::default());
    let mut listener =
        Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap(), AllowList::default(), &stop).unwrap();
    let near = open_source(listener.address(), guest(from), &options, &stop).unwrap();
    let source = SourceGuest {
        memory: guest(from),
        dirty: Vec::new(),
        control: Box::new(TestMachine::running(b"devices")),
    };
    let mut settings = SourceSettings::new(Configuration::default());
    settings.guest_is_paused = true;
    let source = SourceSession::new(source, near, settings);
    // The first bytes of a connection show which one it is.
    let source = std::thread::spawn(move || source.run());
    let connection = listener.accept_connection(&options, &stop).unwrap();
    let mut settings = DestinationSettings::default();
    settings.map_in_background = false;
    let far = DestinationSession::new(
        DestinationGuest { memory: Box::new(guest(to)), control: Box::<TestMachine>::default() },
        connection,
        settings,
    )
    .run();
    let source = source.join().unwrap();
    assert_eq!((source.outcome, far.ending), (Outcome::Completed, Ending::Running), "{source:?} {far:?}");
    seen
}

fn filled() -> Mapping {
    let from = Mapping::anonymous(PAGES * 4096).unwrap();
    let mut word = 1u64;
    let bytes: Vec<u8> = (0..PAGES * 512)
        .flat_map(|_| {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            word.to_le_bytes()
        })
        .collect();
    from.region().span(0, PAGES * 4096).unwrap().copy_from(&bytes);
    from
}

/// Two nodes: `ci/rxe-guest` has one for each of its two processors.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_threads_are_on_the_nodes_chosen_and_pages_on_the_nodes_of_their_threads() {
    let there = numa_nodes();
    let cpus_of = |node: u32| there.iter().find(|there| there.number == node).unwrap().cpus.clone();
    assert_eq!(there.len(), 2, "{there:?}");
    let all = own_cpus().unwrap();
    // The kernel uses another node's memory before it drops cached files: those that other tests have read would fill
    // one.
    std::fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
    // All memory on node 1, which does not have enough processors for each channel.
    let far = cpus_of(1);
    let from = std::thread::spawn(move || set_cpu_affinity(&far).map(|_| filled())).join().unwrap().unwrap();
    assert_eq!(nodes(&from), [1].into());
    for (choice, expected) in [("0", vec![0]), ("1", vec![1]), ("auto", vec![0, 1]), ("off", vec![])] {
        for memfd in [false, true] {
            // A free channel takes a batch: with so little memory, those of one node may get none.
            let mut found = BTreeSet::new();
            for _ in 0..100 {
                let to = match memfd {
                    true => Mapping::memfd("to", PAGES * 4096),
                    false => Mapping::anonymous(PAGES * 4096),
                };
                let to = to.unwrap();
                let seen = migrate(&from, &to, CHANNELS, &choice.parse().unwrap(), None);
                assert!(bytes(&from) == bytes(&to), "{choice}");
                threads_are_on(choice, &expected, &all, &cpus_of, &seen);
                match choice {
                    "auto" => found.extend(nodes(&to)),
                    _ => found = nodes(&to),
                }
                if choice == "off" || found.iter().eq(&expected) {
                    break;
                }
            }
            assert!(choice == "off" || found.iter().eq(&expected), "{choice}: {found:?}");
        }
    }
    // One channel: the node that holds the memory has a processor for it. The destination's memory has no node yet.
    let to = Mapping::anonymous(PAGES * 4096).unwrap();
    let seen = migrate(&from, &to, 1, &Numa::Auto, None);
    let of_end = |end| seen.lock().unwrap().iter().find(|(name, _)| *name == end).unwrap().1.clone();
    assert_eq!((of_end("tx"), of_end("rx"), nodes(&to)), (cpus_of(1), cpus_of(0), [0].into()));
    // The affinity that an embedder has set is not overruled.
    let to = Mapping::anonymous(PAGES * 4096).unwrap();
    let seen = migrate(&from, &to, 1, &Numa::Auto, Some(cpus_of(0)));
    assert!(seen.lock().unwrap().iter().all(|(_, cpus)| *cpus == cpus_of(0)), "{seen:?}");
    assert_eq!(nodes(&to), [0].into());
    the_demos_threads_are_on_node_1();
}

/// Each end has the same number of threads on each of the nodes `expected`; with `off` none is bound.
fn threads_are_on(
    choice: &str,
    expected: &[u32],
    all: &[u32],
    cpus_of: &dyn Fn(u32) -> Vec<u32>,
    seen: &Seen,
) {
    let seen = seen.lock().unwrap();
    for end in ["tx", "rx"] {
        let of_end: Vec<_> = seen.iter().filter(|(name, _)| *name == end).collect();
        assert_eq!(of_end.len(), usize::from(CHANNELS), "{choice}: {seen:?}");
        for node in expected {
            let there = of_end.iter().filter(|(_, cpus)| *cpus == cpus_of(*node)).count();
            assert_eq!(there, usize::from(CHANNELS) / expected.len(), "{choice} {end}: {seen:?}");
        }
        let free = of_end.iter().filter(|(_, cpus)| *cpus == all).count();
        assert_eq!(free, if choice == "off" { usize::from(CHANNELS) } else { 0 }, "{choice}");
    }
}

/// The command's own threads, by /proc: both processes of a demo that lasts until they were found.
fn the_demos_threads_are_on_node_1() {
    let dir = scratch();
    // Several seconds, in which the test searches for its threads.
    let sizes = ["--ram", "24M", "--working-set", "4M", "--dirty-rate", "500K", "--max-bandwidth", "4M"];
    let bound = ["--timeout", "30", "--timeout-action", "finish"];
    let options = ["demo", "--json", "--no-digest", "--transport", "tcp", "--channels", "2"];
    let mut demo = Ramwire::start(dir.path(), &[&options[..], &sizes[..], &bound].concat(), "--numa=1");
    let mut seen = BTreeSet::new();
    let said = || "no threads of page channels".to_owned();
    Deadline::seconds(20).poll("a demo on node 1", said, || {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        for process in std::fs::read_dir("/proc").unwrap().flatten() {
            for task in std::fs::read_dir(process.path().join("task")).into_iter().flatten().flatten() {
                let (name, status) = (read(task.path().join("comm")), read(task.path().join("status")));
                let cpus = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
                if name.starts_with("ramwire-chan") && cpus.map(str::trim) == Some("1") {
                    seen.insert(name.trim().to_owned());
                }
            }
        }
        (seen.len() == 2).then_some(())
    });
    assert_eq!(seen, ["ramwire-chan-rx", "ramwire-chan-tx"].map(str::to_owned).into());
    let report = demo.finished(Deadline::seconds(60), 0);
    assert_eq!(report["verified"], true, "{report}");
}

#[test]
fn a_node_that_is_not_here_is_refused_and_one_node_needs_no_choice() {
    if numa_nodes().is_empty() {
        return crate::common::skip("NUMA nodes: a kernel that tells of them in /sys/devices/system/node");
    }
    let output = Command::new(env!("CARGO_BIN_EXE_ramwire"))
        .args(["demo", "--channels=2", "--numa=0,1000"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("--numa 0,1000: there is no node 1000; the nodes are"), "{errors}");
    if numa_nodes().len() == 1 {
        let from = Mapping::anonymous(PAGES * 4096).unwrap();
        from.region().span(0, 8).unwrap().copy_from(b"one node");
        let to = Mapping::anonymous(PAGES * 4096).unwrap();
        let seen = migrate(&from, &to, CHANNELS, &Numa::Nodes(vec![0]), None);
        assert!(bytes(&from) == bytes(&to));
        let all = own_cpus().unwrap();
        assert!(seen.lock().unwrap().iter().all(|(_, cpus)| *cpus == all), "{seen:?}");
    }
}
