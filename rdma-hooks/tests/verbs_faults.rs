//! What goes wrong on a real verbs device: dead peers, a device that goes away, a link that goes down, a limit.
//!
//! Needs a device (see `verbs.rs`). The part that takes the device away runs only on a machine that is thrown away
//! afterwards (`RAMWIRE_IN_GUEST`), as root, with a soft-RoCE device `rxe0` over `dummy0`.

#![cfg(feature = "verbs")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use common::device::address;
use common::mapped::Mapped;
use common::{Guest, Plan, Ram, receive, send};
use rdma_hooks::control::Kind;
use rdma_hooks::tap::{Posting, Tapped};
use rdma_hooks::verbs::VerbsFabric;
use rdma_hooks::{
    Counters, ExtensionOffer, Fabric, FabricError, Features, HooksError, MigrationId, SourceConfig,
};

/// A fabric whose process dies when it sends the second message of a kind (or the first, if there is but one).
fn dying(kind: Kind) -> Tapped<VerbsFabric> {
    let once = matches!(
        kind,
        Kind::RamBlocksRequest | Kind::RamBlocksResult | Kind::Done | Kind::ZeroRuns | Kind::Alive
    );
    let left = AtomicU32::new(if once { 1 } else { 2 });
    at_message(kind, move || {
        if left.fetch_sub(1, Ordering::Relaxed) == 1 {
            println!("dying");
            std::process::abort();
        }
    })
}

/// A fabric that calls back before a message of a kind is posted.
fn at_message(kind: Kind, call: impl Fn() + Send + Sync + 'static) -> Tapped<VerbsFabric> {
    Tapped::new(VerbsFabric::open().unwrap(), move |posting| match posting {
        Posting::Message(parts) if parts[0][4..8] == (kind as u32).to_be_bytes() => call(),
        _ => {}
    })
}

/// A small pin budget, so that every kind of message is sent.
fn plan() -> Plan {
    let source = SourceConfig { pin_budget_bytes: Some(2 << 20), ..SourceConfig::default() };
    Plan { source, rounds: 2, ..Plan::default() }
}

/// What goes beyond QEMU too: queue pairs, credits, batches of keys, lists of zero ranges.
fn plan_with(native: bool) -> Plan {
    let Plan { mut source, .. } = plan();
    let (features, migration) = (Features::ALL, MigrationId([5; 16]));
    source.extension = native.then_some(ExtensionOffer { data_queues: 2, window: 4, features, migration });
    Plan { source, data_queues: 2, window: 4, features, ..plan() }
}

/// As many rounds as the message needs: a list of zero ranges goes only when several have gathered, which a quick
/// destination may put off for many rounds. A source says that it is alive when it has said nothing for a second.
fn plan_for(kind: Kind, native: bool) -> Plan {
    let plan = plan_with(native);
    let holds = Duration::from_millis(if kind == Kind::Alive { 1500 } else { 0 });
    Plan { rounds: if kind == Kind::ZeroRuns { u64::MAX } else { plan.rounds }, holds, ..plan }
}

/// Round after round until something breaks.
fn endless() -> Plan {
    Plan { rounds: u64::MAX, ..plan() }
}

/// Runs this program again, as one end that dies.
fn spawn(role: &str, detail: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_other_process", "--nocapture"])
        .env("RDMA_HOOKS_ROLE", role)
        .env("RDMA_HOOKS_DETAIL", detail)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let said = BufReader::new(child.stdout.take().unwrap());
    (child, said)
}

/// Not a test of its own: the end that dies, or that is limited.
#[test]
fn the_other_process() {
    let Ok(role) = std::env::var("RDMA_HOOKS_ROLE") else { return };
    let detail = std::env::var("RDMA_HOOKS_DETAIL").unwrap();
    let address = address().unwrap();
    let mut words = detail.split_whitespace().map(|word| word.parse::<u32>().unwrap());
    let mut word = || words.next().unwrap();
    let inner = VerbsFabric::open().unwrap();
    match role.as_str() {
        "source" => {
            let kind = Kind::from_wire(word()).unwrap();
            let fabric = dying(kind);
            let mut guest = busy_guest();
            let (port, plan) = (word() as u16, plan_for(kind, word() == 1));
            let _ = send(&fabric, &address, port, &mut guest, &plan, &mut Counters::default());
        }
        "destination" => {
            let fabric = dying(Kind::from_wire(word()).unwrap());
            let listener = fabric.listen(&address, 0).unwrap();
            println!("port {}", listener.port());
            let _ = receive(&fabric, listener, &Ram::<Mapped>::zeros(), &plan_with(true));
        }
        "endless source" => {
            let mut guest = busy_guest();
            let sent =
                send(&inner, &address, word() as u16, &mut guest, &endless(), &mut Counters::default());
            println!("said {}", sent.unwrap_err());
        }
        "endless destination" => {
            let listener = inner.listen(&address, 0).unwrap();
            println!("port {}", listener.port());
            let received = receive(&inner, listener, &Ram::<Mapped>::zeros(), &endless());
            println!("said {}", received.unwrap_err());
        }
        "limited" => {
            let lock = inner.memory_lock();
            println!("limit {lock:?}");
            let mut guest = busy_guest();
            let sent = send(&inner, &address, word() as u16, &mut guest, &plan(), &mut Counters::default());
            println!("said {}", sent.unwrap_err());
        }
        other => panic!("role {other}"),
    }
}

fn busy_guest() -> Guest<Mapped> {
    let mut guest = Guest::new(7);
    for _ in 0..3 {
        guest.run(60);
    }
    guest
}

/// What the kernel lists of a kind of RDMA resource.
fn resources(kind: &str) -> Vec<u8> {
    Command::new("rdma").args(["resource", "show", kind]).output().expect("rdma").stdout
}

fn registrations() -> usize {
    String::from_utf8_lossy(&resources("mr")).lines().filter(|line| line.contains("mrn")).count()
}

mod in_rxe_guest {
    use super::*;

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn r54_a_peer_that_dies_at_any_kind_of_message_is_noticed_in_seconds() {
        let address = address().expect("a device");
        use Kind::{
            Alive, Compress, Done, Fence, RamBlocksRequest, RamBlocksResult, Ready, RegisterFinished,
            RegisterRequest, RegisterResult, Stream, UnregisterFinished, UnregisterRequest, ZeroRuns,
        };
        let qemus =
            [Stream, RamBlocksRequest, Compress, RegisterRequest, RegisterFinished, UnregisterRequest];
        let natives = [Stream, ZeroRuns, RegisterRequest, Fence, Alive, RegisterFinished];
        let of_both = qemus.map(|kind| (kind, false)).into_iter().chain(natives.map(|kind| (kind, true)));
        for (kind, native) in of_both {
            let fabric = VerbsFabric::open().unwrap();
            let listener = fabric.listen(&address, 0).unwrap();
            let (mut child, mut said) =
                spawn("source", &format!("{} {} {}", kind as u32, listener.port(), u32::from(native)));
            let target = Ram::<Mapped>::zeros();
            let (ended, noticed) = std::thread::scope(|scope| {
                let survivor = scope
                    .spawn(|| (receive(&fabric, listener, &target, &plan_for(kind, native)), Instant::now()));
                let died = wait_for_death(&mut said, true);
                child.wait().unwrap();
                let (ended, at) = survivor.join().unwrap();
                (ended, at.saturating_duration_since(died))
            });
            println!(
                "source (native: {native}) dies at {kind:?}: destination says after {noticed:?}: {}",
                ended.as_ref().unwrap_err()
            );
            assert_gone(&ended.unwrap_err(), noticed);
        }
        let qemus = [Ready, RamBlocksResult, RegisterResult, UnregisterFinished];
        // Nobody answers a source that is alive: the destination is killed when that is about to be said.
        let natives = [Ready, RegisterResult, Done, Alive];
        let of_both = qemus.map(|kind| (kind, false)).into_iter().chain(natives.map(|kind| (kind, true)));
        for (kind, native) in of_both {
            let (child, mut said) = spawn("destination", &(kind as u32).to_string());
            let child = Arc::new(Mutex::new(child));
            let victim = Arc::clone(&child);
            let fabric = at_message(Alive, move || {
                if kind == Alive {
                    victim.lock().unwrap().kill().unwrap();
                }
            });
            let port = find(&mut said, "port ").expect("port").parse().unwrap();
            let mut guest = busy_guest();
            let (ended, noticed) = std::thread::scope(|scope| {
                let survivor = scope.spawn(|| {
                    let sent = send(
                        &fabric,
                        &address,
                        port,
                        &mut guest,
                        &plan_for(kind, native),
                        &mut Counters::default(),
                    );
                    (sent, Instant::now())
                });
                let died = wait_for_death(&mut said, kind != Alive);
                child.lock().unwrap().wait().unwrap();
                let (ended, at) = survivor.join().unwrap();
                (ended, at.saturating_duration_since(died))
            });
            println!(
                "destination (native: {native}) dies at {kind:?}: source says after {noticed:?}: {}",
                ended.as_ref().unwrap_err()
            );
            assert_gone(&ended.unwrap_err(), noticed);
        }
        assert_eq!(registrations(), 0, "registrations are left");
    }

    fn assert_gone(error: &HooksError, noticed: Duration) {
        assert!(
            matches!(error, HooksError::Fabric(FabricError::Disconnected | FabricError::Completion { .. })),
            "{error:?}"
        );
        assert!(noticed < Duration::from_secs(5), "{noticed:?}");
    }

    fn find(said: &mut impl BufRead, start: &str) -> Option<String> {
        said.lines()
            .map_while(Result::ok)
            .find_map(|line| line.split_once(start).map(|(_, rest)| rest.to_owned()))
    }

    /// Waits for the last the other process says: that it dies, if it does that by itself.
    fn wait_for_death(said: &mut impl BufRead, by_itself: bool) -> Instant {
        assert_eq!(find(said, "dying").is_some(), by_itself, "the other process dies as told");
        Instant::now()
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn w31_a_limit_on_locked_memory_is_an_error_that_names_the_remedy() {
        let address = address().expect("a device");
        let fabric = VerbsFabric::open().unwrap();
        let listener = fabric.listen(&address, 0).unwrap();
        // For root the limit counts only without the capability that lifts it.
        let script = "ulimit -l 64; exec setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \"$0\" \"$@\"";
        let output = Command::new("bash")
            .args(["-c", script])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "the_other_process", "--nocapture"])
            .env("RDMA_HOOKS_ROLE", "limited")
            .env("RDMA_HOOKS_DETAIL", listener.port().to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        println!("{said}");
        assert!(said.contains("limit_bytes: Some(65536), is_lifted: false"), "{said}");
        assert!(said.contains("ulimit -l") && said.contains("CAP_IPC_LOCK"), "{said}");
    }

    fn system(command: &str) {
        assert!(Command::new("bash").args(["-c", command]).status().unwrap().success(), "{command}");
    }

    /// Breaks something under a migration of two other processes: a device that is taken away may wait until every
    /// process that used it is gone. Returns what the two said, and how long they took.
    fn break_while_migrating(how: &str, mend: &str) -> (String, String, Duration) {
        let (mut there, mut destination) = spawn("endless destination", "");
        let port = find(&mut destination, "port ").expect("port");
        let (mut here, source) = spawn("endless source", &port);
        // Buffers for messages are two registrations at each end; more are guest memory.
        let until = Instant::now() + Duration::from_secs(30);
        while registrations() <= 4 {
            assert!(Instant::now() < until, "no migration within 30 s");
            std::thread::sleep(Duration::from_millis(50));
        }
        std::thread::sleep(Duration::from_secs(1));
        assert!(here.try_wait().unwrap().is_none() && there.try_wait().unwrap().is_none(), "they migrate");
        let at = Instant::now();
        let mut breaking = Command::new("bash").args(["-c", how]).spawn().unwrap();
        let said = [source, destination].map(|mut said| {
            let (line, later) = mpsc::channel();
            std::thread::spawn(move || line.send(find(&mut said, "said ")));
            later
        });
        let ends = [&mut here, &mut there, &mut breaking];
        let said = said.map(|later| later.recv_timeout(Duration::from_secs(60).saturating_sub(at.elapsed())));
        let took = at.elapsed();
        let hangs = said.iter().any(Result::is_err) || !all_end(ends);
        if hangs {
            for (who, child) in [("source", &mut here), ("destination", &mut there), (how, &mut breaking)] {
                println!("{who}:\n{}", where_it_is(child));
                let _ = child.kill();
            }
        }
        assert!(!hangs, "{how}: after {took:?} not all have ended: {said:?}");
        assert!(breaking.wait().unwrap().success(), "{how}");
        system(mend);
        let [source, destination] = said.map(|said| said.unwrap().expect("an error, not a crash"));
        (source, destination, took)
    }

    /// Whether all of these processes end within half a minute.
    fn all_end(mut children: [&mut Child; 3]) -> bool {
        let until = Instant::now() + Duration::from_secs(30);
        while Instant::now() < until {
            if children.iter_mut().all(|child| child.try_wait().unwrap().is_some()) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        false
    }

    /// Each thread of a process: its name, and where in the kernel it waits.
    fn where_it_is(child: &Child) -> String {
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", child.id())) else {
            return "it has ended".into();
        };
        let threads = threads.filter_map(Result::ok).map(|thread| {
            let [name, stack] = ["comm", "stack"].map(|file| read(thread.path().join(file)));
            format!("{name}{stack}")
        });
        threads.collect()
    }

    #[test]
    #[ignore = "runs in ci/rxe-guest"]
    fn a_device_that_goes_away_and_a_link_that_goes_down_end_both_sides_in_seconds() {
        // Nothing here uses the device: librdmacm keeps one open as long as its process lives, and soft-RoCE's can't be
        // taken away from a process.
        assert!(
            std::env::var_os("RAMWIRE_IN_GUEST").is_some(),
            "only in a guest: this takes the device away"
        );
        let faults = [
            ("rdma link delete rxe0", "rdma link add rxe0 type rxe netdev dummy0; sleep 1"),
            // After its link was down, soft-RoCE connects nobody until the device is made anew.
            (
                "ip link set dummy0 down",
                "ip link set dummy0 up; rdma link delete rxe0; rdma link add rxe0 type rxe netdev dummy0; sleep 1",
            ),
        ];
        for (how, mend) in faults {
            let (source, destination, took) = break_while_migrating(how, mend);
            println!("{how}, after {took:?}: source: {source}; destination: {destination}");
            assert!(took < Duration::from_secs(10), "{took:?}");
            assert!(!source.contains("ESTABLISHED") && !destination.contains("REQUEST"), "in mid-transfer");
            assert_eq!(registrations(), 0, "{how}: registrations are left");
        }
        // And everything works again.
        let fabric = VerbsFabric::open().unwrap();
        assert!(fabric.listen(&address().expect("a device"), 0).is_ok());
    }
}
