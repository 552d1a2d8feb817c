//! The choice and the messages of `auto`, and `devices`: with RDMA, and with each possible obstacle.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramwire::guest::{GuestError, GuestMemory, MappedGuest};
use ramwire::ram::{BlockName, Landing, RamBlock, RamBlockTable};
use ramwire::sys::{CancelToken, HostSpan, Mapping, Stop};
use ramwire::transport::{
    Address, AllowList, ConnectionOptions, Listener, OpenError, RdmaOptions, StreamOptions, open_source,
};
use ramwire::units::PageSize;
use serde_json::{Value, json};

use crate::common::{
    Deadline, RXE_ADDRESS,
    memory::{Pattern, compare, fill},
    ramwire::Ramwire,
    scratch,
};
use crate::demo;

/// Removes root's right to lock unlimited memory, and limits it to 64 KiB.
pub(crate) const LIMITED: &str =
    "ulimit -l 64; set -- setpriv --bounding-set -ipc_lock --inh-caps -ipc_lock \"$@\";";

/// Hides rdma-core's libraries, for this command alone.
const HIDDEN: &str = "set -- unshare --mount sh -c 'for name in libibverbs.so.1 librdmacm.so.1; do \
    ldconfig -p | sed -n \"s|.*$name .*=> ||p\" | while read -r file; do mount --bind /dev/null \"$(realpath \"$file\")\"; done; \
    done; exec \"$@\"' sh \"$@\";";

fn devices() -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_ramwire")).args(["devices", "--json"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Sends a small guest by `auto:` from a `send` to a `receive` at `listen`; returns both reports.
fn send_by_auto(listen: &str, prepare: &str) -> (Value, Value) {
    let (sent, received, _) = send_with(listen, prepare, &[], &[]);
    (sent, received)
}

/// The same with further options of both ends; also what the receiver said.
pub(crate) fn send_with(
    listen: &str,
    prepare: &str,
    receiving: &[&str],
    sending: &[&str],
) -> (Value, Value, String) {
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 8, Pattern::Mixed { seed: 41 });
    let arguments = [&["receive", listen, "--json"], receiving, &["--dir"]].concat();
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    let uri = receiver.listening().replacen("tcp:", "auto:", 1);
    let block = format!("m0={}", ram.display());
    let script = format!("{prepare} exec \"$@\"");
    let mut sender = Command::new("sh");
    sender.args(["-c", &script, "send", env!("CARGO_BIN_EXE_ramwire"), "send", &uri, "--json", "--digest"]);
    let output = sender.args(sending).args(["--ram", &block]).output().unwrap();
    assert!(output.status.success(), "{output:?}\n{}", receiver.errors());
    let sent = serde_json::from_slice(&output.stdout).unwrap();
    let received = receiver.finished(Deadline::seconds(20), 0);
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
    (sent, received, receiver.errors())
}

pub(crate) fn assert_why(report: &Value, transport: &str, parts: &[&str]) {
    let why = report["why"].as_str().unwrap();
    let whole = report["transport"] == transport && parts.iter().all(|part| why.contains(part));
    assert!(whole, "{transport} because of {parts:?}: {report}");
    println!("{why}");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_auto_takes_rdma_where_it_works_and_says_exactly_what_stands_in_its_way() {
    let listen = format!("auto:{RXE_ADDRESS}:0");
    let (sent, received) = send_by_auto(&listen, "");
    assert_why(&sent, "rdma", &["both ends"]);
    assert_why(&received, "rdma", &[]);

    for (prepare, parts) in [
        (LIMITED, ["RDMA did not work: memory-lock limit: ", "limit is 65536"]),
        (HIDDEN, ["RDMA did not work: no library: ", "install rdma-core"]),
    ] {
        // Only the source has the obstacle, and connects by TCP to the same listener.
        let (sent, received) = send_by_auto(&listen, prepare);
        assert_why(&sent, "tcp", &parts);
        assert_why(&received, "tcp", &["the source connected by TCP"]);
        let report = demo(prepare, &["--transport", "auto"]);
        assert_why(&report, "tcp", &parts);
    }
    let (sent, _) = send_by_auto(&format!("tcp:{RXE_ADDRESS}:0"), "");
    assert_why(&sent, "tcp", &["RDMA did not work: refused by peer: ", "no process listens"]);
    // No device reaches the loopback.
    let (sent, received) = send_by_auto("auto:127.0.0.1:0", "");
    assert_why(&sent, "tcp", &["RDMA did not work: no route: "]);
    assert_why(&received, "tcp", &["RDMA did not work: no device: the loopback has none"]);
    for host in ["127.0.0.1", "[::1]"] {
        let dir = scratch();
        fill(&dir.path().join("ram"), 1, Pattern::Zero);
        let (uri, block) = (format!("rdma:{host}:4444"), format!("m0={}", dir.path().join("ram").display()));
        let mut sender = Ramwire::start(dir.path(), &["send", &uri, "--ram"], block);
        let (status, text) = sender.ended(Deadline::seconds(10));
        println!("{text}");
        let parts =
            [&uri, "no RDMA device of this host has, or reaches, that address", "loopback", "`rdma link`"];
        assert!(status != 0 && parts.iter().all(|part| text.contains(part)), "{status}: {text}");
        // No peer could reach a receiver there either, although the kernel would let it listen.
        let mut receiver = Ramwire::start(dir.path(), &["receive", &uri, "--dir"], dir.path().join("none"));
        let (status, text) = receiver.ended(Deadline::seconds(10));
        assert!(status != 0 && parts.iter().all(|part| text.contains(part)), "{status}: {text}");
    }

    let report = demo("", &["--transport", "auto"]);
    assert_why(&report, "rdma", &["both ends"]);
}

fn one_page() -> Arc<MappedGuest> {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), 4096);
    let builder = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &Mapping::anonymous(4096).unwrap());
    Arc::new(builder.build().unwrap())
}

/// The device's subnet has no such host, and its interface drops the packets.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_peer_that_answers_nothing_is_given_up_within_two_seconds() {
    let mut impatient = StreamOptions::default();
    impatient.dead_peer = Duration::from_millis(500);
    let address = Address::auto("10.9.0.77", 4444);
    let began = Instant::now();
    let stop = Stop::on(&CancelToken::default());
    let opened = open_source(&address, one_page(), &ConnectionOptions::of_stream(impatient), &stop);
    let took = began.elapsed();
    let Err(OpenError::Neither { rdma, tcp, .. }) = opened else { panic!("there is no such host") };
    println!("{took:?}: {rdma}; {tcp}");
    assert!(rdma.contains("no route: no answer from rdma:10.9.0.77:4444 within 2 s"), "{rdma}");
    // Two seconds for RDMA, half a second for TCP, the rest for an emulated machine.
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_devices_tells_what_there_is_and_each_limit_with_a_verdict() {
    let found = devices();
    assert_eq!((&found["usable"], &found["address"]), (&json!(true), &json!(RXE_ADDRESS)), "{found}");
    let device = &found["devices"][0];
    assert_eq!((&device["name"], &device["ports"][0]["usable"]), (&json!("rxe0"), &json!(true)), "{found}");
    assert_eq!(device["ports"][0]["link_layer"], "Ethernet", "{found}");
    assert_eq!(device["ports"][0]["addresses"], json!([RXE_ADDRESS]), "{found}");
    assert!(device["max_inline_bytes"].as_u64() > Some(0), "soft-RoCE has inline data: {found}");
    let limits = device["limits"].as_array().unwrap();
    for limit in limits {
        let verdict = limit["verdict"].as_str().unwrap();
        assert_eq!(verdict == "good", limit["remedy"].is_null(), "a verdict but good has a remedy: {limit}");
        println!("{limit}");
    }
    assert_eq!((limits.len(), &found["memory_lock"]["verdict"]), (5, &json!("good")), "{found}");
}

/// A network namespace sees the device, but its GIDs are addresses of another namespace: no peer there can be reached
/// by them.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_gid_that_is_no_address_of_this_host_is_not_taken_for_one() {
    let mut command = Command::new("unshare");
    command.args(["--net", env!("CARGO_BIN_EXE_ramwire"), "devices", "--json"]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let port = &found["devices"][0]["ports"][0];
    let gids = port["gids"].as_array().unwrap();
    assert!(
        gids.contains(&json!(format!("::ffff:{RXE_ADDRESS}"))),
        "the device is seen, with its GIDs: {found}"
    );
    assert_eq!((&port["addresses"], &port["usable"]), (&json!([]), &json!(false)), "{found}");
    assert!(port["remedy"].as_str().unwrap().contains("ip addr add"), "{found}");
    assert!(found["usable"] == false && found["address"].is_null(), "{found}");
    let why = found["why_not"].as_str().unwrap();
    assert!(why.contains("active port with an IP address (rxe0)"), "{found}");
}

/// A host without rdma-core runs the same binary.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_without_rdma_core_everything_but_rdma_works() {
    let run = |arguments: &[&str]| {
        let script = format!("{HIDDEN} exec \"$@\"");
        let mut command = Command::new("sh");
        command
            .args(["-c", &script, "hidden", env!("CARGO_BIN_EXE_ramwire")])
            .args(arguments)
            .output()
            .unwrap()
    };
    let found = run(&["devices", "--json"]);
    assert!(found.status.success(), "{found:?}");
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert!(found["usable"] == false && found["devices"].as_array().unwrap().is_empty(), "{found}");
    assert!(found["why_not"].as_str().unwrap().contains("install rdma-core"), "{found}");
    let report = demo(HIDDEN, &["--transport", "tcp"]);
    assert_eq!(report["transport"], "tcp");
    for arguments in
        [&["demo", "--transport", "rdma"][..], &["receive", "rdma:10.9.0.1:0", "--dir", "/tmp/none"]]
    {
        let refused = run(arguments);
        let errors = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(3) && errors.contains("install rdma-core"), "{errors}");
    }
}

/// If the guest's memory may move, it is sent by TCP, whatever devices exist.
#[test]
fn memory_that_cannot_promise_to_stay_goes_by_tcp_and_the_report_says_so() {
    let stop = Stop::on(&CancelToken::default());
    let listen: Address = "tcp:127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind(&listen, AllowList::default(), &stop).unwrap();
    let (host, port) = listener.address().host_and_port().unwrap();
    let mut rdma = RdmaOptions::default();
    rdma.may_discard = true;
    let mut options = ConnectionOptions::default();
    options.rdma = rdma;
    let address = Address::auto(host, port);
    let way = open_source(&address, one_page(), &options, &stop).unwrap().chosen;
    assert_eq!(way.transport, "tcp");
    let promise = "RDMA did not work: memory that may be discarded: ";
    assert!(way.why.starts_with(promise), "{}", way.why);
    // Memory without a fixed address, of a guest that would promise it.
    let moving: Arc<dyn GuestMemory> = Arc::new(Moving(one_page()));
    let way = open_source(&address, moving, &ConnectionOptions::default(), &stop).unwrap().chosen;
    assert!(way.transport == "tcp" && way.why.starts_with(promise), "{}", way.why);
    let refused = open_source(&Address::rdma(host, port), one_page(), &options, &stop);
    assert!(matches!(refused, Err(OpenError::NoRdma { .. })), "with rdma: there is no other way");
}

struct Moving(Arc<MappedGuest>);

impl GuestMemory for Moving {
    fn table(&self) -> &RamBlockTable {
        self.0.table()
    }
    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        self.0.span(landing)
    }
    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.0.discard(landing)
    }
}

/// With a device, this host reaches only other hosts by it, never its loopback.
#[test]
fn an_auto_address_falls_back_to_tcp_and_says_why() {
    let (sent, received) = send_by_auto("auto:127.0.0.1:0", "");
    assert_why(&sent, "tcp", &["RDMA did not work: "]);
    assert_why(&received, "tcp", &["RDMA did not work: "]);
}

/// On a machine without a device; with one the other tests cover more.
#[test]
fn a_host_says_what_it_has_for_rdma() {
    let found = devices();
    assert!(
        found["usable"] == true || found["why_not"].as_str().is_some_and(|why| !why.is_empty()),
        "{found}"
    );
}
