//! `rdma:` with TLS beside it: who is refused, and what a listener in the network sees.

use std::collections::HashSet;
use std::io::{ErrorKind, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::auto::{LIMITED, assert_why, send_with};
use crate::common::{
    Deadline, RXE_ADDRESS,
    certificates::Authority,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use crate::network::{End, FAR, Network};

/// The name of the RAM block.
const BLOCK: &str = "memory-of-the-guest";
const MIB: usize = 2;

fn authority(dir: &Path, name: &str) -> String {
    format!("--tls-dir={}", Authority::new(name).folder(dir.join(name)).display())
}

fn receiver(dir: &Path, at: &str, more: &[&str], folder: &Path) -> (Ramwire, String) {
    let uri = format!("rdma:{at}:0");
    let arguments = [&["receive", &uri, "--json"], more, &["--dir"]].concat();
    let mut receiver = Ramwire::start(dir, &arguments, folder);
    let uri = receiver.listening();
    (receiver, uri)
}

fn sender(dir: &Path, uri: &str, more: &[&str], ram: &Path) -> Ramwire {
    let arguments = [&["send", uri, "--json"], more, &["--ram"]].concat();
    Ramwire::start(dir, &arguments, format!("{BLOCK}={}", ram.display()))
}

/// A small guest's memory, and where it is to arrive.
fn guest(dir: &Path) -> (PathBuf, PathBuf) {
    let ram = dir.join("ram");
    fill(&ram, MIB, Pattern::Mixed { seed: 71 });
    (ram, dir.join("guest"))
}

fn arrives(mut receiver: Ramwire, mut sender: Ramwire, ram: &Path, folder: &Path) {
    let sent = sender.finished(Deadline::seconds(30), 0);
    let received = receiver.finished(Deadline::seconds(20), 0);
    for report in [sent, received] {
        assert_eq!(report["transport"], json!("rdma"), "{report}");
    }
    compare(ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_with_tls_who_is_unknown_is_refused_and_the_right_source_is_taken() {
    assert!(peers_present(), "nothing is skipped in the guest");
    let dir = scratch();
    let (ram, folder) = guest(dir.path());
    let (ours, theirs) = (authority(dir.path(), "ours"), authority(dir.path(), "theirs"));
    let host = "--tls-hostname=localhost";
    let (receiver, uri) = receiver(dir.path(), RXE_ADDRESS, &[&ours], &folder);

    let said = sender(dir.path(), &uri, &[], &ram).failed(Deadline::seconds(20), 3);
    assert!(said.contains("REJECTED") && said.contains("does not accept"), "{said}");
    let qemus = dir.path().join("qemus");
    fill(&qemus, 16, Pattern::Zero);
    let mut qemu = Guest::new(Version::Qemu100, Machine::Q35, qemus, 16).start(dir.path(), "source");
    let refused = qemu.try_execute("migrate", json!({ "uri": uri })).unwrap_err();
    assert!(refused.to_string().contains("RDMA ERROR"), "{refused}");
    let said = sender(dir.path(), &uri, &[&theirs, host], &ram).failed(Deadline::seconds(20), 3);
    assert!(said.contains("of another authority"), "{said}");
    let plain_tcp = uri.replacen("rdma:", "tcp:", 1);
    let said = sender(dir.path(), &plain_tcp, &[&ours, host], &ram).failed(Deadline::seconds(20), 3);
    println!("{said}");

    let sender = sender(dir.path(), &uri, &[&ours, host, "--queue-pairs=3"], &ram);
    let told = receiver.errors();
    assert_eq!(told.matches("asks for a queue pair without TLS").count(), 2, "{told}");
    assert!(told.contains("of a source by tcp:"), "{told}");
    assert!(told.contains("only they"), "the pages are told as unencrypted: {told}");
    arrives(receiver, sender, &ram, &folder);

    // A destination without TLS.
    let folder = dir.path().join("plain");
    let (_receiver, uri) = self::receiver(dir.path(), RXE_ADDRESS, &[], &folder);
    let said = self::sender(dir.path(), &uri, &[&ours, host], &ram).failed(Deadline::seconds(20), 3);
    assert!(said.contains("refused"), "{said}");
    let said = self::sender(dir.path(), &uri, &[&ours, host, "--require-tls"], &ram);
    let said = { said }.failed(Deadline::seconds(20), 2);
    assert!(said.contains("the pages of guest RAM travel unencrypted"), "{said}");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_auto_with_tls_is_rdma_between_ends_that_know_each_other_or_else_tcp() {
    let dir = scratch();
    let ours = authority(dir.path(), "ours");
    let both =
        |listen: &str, prepare| send_with(listen, prepare, &[&ours], &[&ours, "--tls-hostname=localhost"]);
    let listen = format!("auto:{RXE_ADDRESS}:0");
    let (sent, received, told) = both(&listen, "");
    assert_why(&sent, "rdma", &["both ends"]);
    assert_why(&received, "rdma", &[]);
    assert!(told.contains("only they"), "the pages are told as unencrypted: {told}");
    let (sent, received, _) = both(&listen, LIMITED);
    assert_why(&sent, "tcp", &["RDMA did not work: memory-lock limit: "]);
    assert_why(&received, "tcp", &["the source connected by TCP"]);
    // It asks there for queue pairs first.
    let (sent, _, told) = both(&format!("tcp:{RXE_ADDRESS}:0"), "");
    assert_why(&sent, "tcp", &["RDMA did not work: refused by peer: "]);
    assert!(told.contains("of a source by rdma:, and this end does not listen for RDMA"), "{told}");

    // A relay between, whose sides have authorities of their own.
    let (ram, folder) = guest(dir.path());
    let theirs = authority(dir.path(), "theirs");
    let mut receiver = Ramwire::start(dir.path(), &["receive", &listen, "--json", &theirs, "--dir"], &folder);
    let near = format!("--listen-{}", &ours[2..]);
    let hostname = "--tls-hostname=localhost";
    let relay = ["relay", "--json", "--listen", &listen, &near, &theirs, hostname, "--connect"];
    let mut relay = Ramwire::start(dir.path(), &relay, receiver.listening());
    let sent =
        sender(dir.path(), &relay.listening(), &[&ours, hostname], &ram).finished(Deadline::seconds(30), 0);
    let passed = relay.finished(Deadline::seconds(20), 0);
    let received = receiver.finished(Deadline::seconds(20), 0);
    assert_eq!((&sent["transport"], &received["transport"]), (&json!("rdma"), &json!("rdma")), "{passed}");
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
}

/// Everything that any network interface sends or receives.
struct Capture {
    ended: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Vec<u8>>>,
}

impl Capture {
    fn start() -> Self {
        std::fs::write("/proc/sys/net/core/rmem_max", "67108864").unwrap();
        let every_protocol = Protocol::from(i32::from(3_u16.to_be()));
        let mut socket = Socket::new(Domain::PACKET, Type::RAW, Some(every_protocol)).unwrap();
        socket.set_recv_buffer_size(64 << 20).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let ended = Arc::new(AtomicBool::new(false));
        let ends = Arc::clone(&ended);
        let thread = thread::spawn(move || {
            let mut frames = Vec::new();
            let mut room = vec![0; 16 << 10];
            loop {
                match socket.read(&mut room) {
                    Ok(count) => frames.push(room[..count].to_vec()),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        if ends.load(Ordering::Relaxed) {
                            return frames;
                        }
                    }
                    Err(error) => panic!("{error}"),
                }
            }
        });
        Self { ended, thread }
    }

    fn seen(self) -> Seen {
        self.ended.store(true, Ordering::Relaxed);
        let mut seen = Seen::default();
        self.thread.join().unwrap().iter().for_each(|frame| seen.add(frame));
        seen
    }
}

/// What a capture holds.
#[derive(Default)]
struct Seen {
    /// The keys in the headers of RDMA WRITEs.
    keys: HashSet<[u8; 4]>,
    /// The payload of RDMA WRITEs.
    pages: Vec<u8>,
    /// The payload of all else: messages on queue pairs, of the connection manager, and TCP.
    messages: Vec<u8>,
}

impl Seen {
    fn add(&mut self, frame: &[u8]) {
        const IP: usize = 14;
        if frame.get(12..14) != Some(&[8, 0]) {
            return;
        }
        let transport = IP + usize::from(frame[IP] & 15) * 4;
        match (frame[IP + 9], &frame[transport..]) {
            (6, segment) => self.messages.extend(&segment[usize::from(segment[12] >> 4) * 4..]),
            // UDP at the port of RoCE; a base header of 12 bytes, whose first is the operation.
            (17, [_, _, 0x12, 0xb7, _, _, _, _, operation, rest @ ..]) => match operation {
                // WRITE, its first or only packet: address, key and length.
                6 | 10 | 11 => {
                    // A probe of a quiet peer has no bytes, and needs no key.
                    self.keys.extend(<[u8; 4]>::try_from(&rest[19..23]).ok().filter(|key| *key != [0; 4]));
                    self.pages.extend(&rest[27..]);
                }
                7..=9 => self.pages.extend(&rest[11..]),
                _ => self.messages.extend(&rest[11..]),
            },
            _ => {}
        }
    }

    /// Keys in a message that grants them: four bytes of zero follow.
    fn keys_in_messages(&self) -> usize {
        let granted = self.messages.windows(8).filter(|window| window[4..] == [0; 4]);
        let granted: HashSet<&[u8]> = granted.map(|window| &window[..4]).collect();
        self.keys.iter().filter(|key| granted.contains(key.as_slice())).count()
    }

    fn messages_hold(&self, word: &[u8]) -> bool {
        self.messages.windows(word.len()).any(|window| window == word)
    }
}

fn captured(dir: &Path, name: &str, receiving: &[&str], sending: &[&str]) -> Seen {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    let (ram, folder) = guest(&dir);
    let (receiver, uri) = receiver(&dir, FAR, receiving, &folder);
    let capture = Capture::start();
    let sender = sender(&dir, &uri, sending, &ram);
    arrives(receiver, sender, &ram, &folder);
    let seen = capture.seen();
    println!(
        "{name}: {} keys, {} B in messages, {} B of pages",
        seen.keys.len(),
        seen.messages.len(),
        seen.pages.len()
    );
    assert!(!seen.keys.is_empty() && seen.pages.len() >= MIB << 19, "{name}: the capture is not whole");
    seen
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_a_capture_shows_no_message_with_tls_and_the_pages_as_they_are() {
    let _network = Network::new();
    let dir = scratch();
    for pin_all in [&[][..], &["--pin-all"]] {
        let dir = tempfile::tempdir_in(dir.path()).unwrap();
        let plain = captured(dir.path(), "plain", &[], pin_all);
        assert!(plain.keys_in_messages() > 0, "this looks at the wrong place");
        assert!(plain.messages_hold(BLOCK.as_bytes()) && plain.messages_hold(b"QEVM"));

        let tls = authority(dir.path(), "ours");
        let sending = [pin_all, &[&tls, "--tls-hostname=localhost"]].concat();
        let secured = captured(dir.path(), "with TLS", &[&tls], &sending);
        assert_eq!(secured.keys_in_messages(), 0, "a key in clear");
        assert!(!secured.messages_hold(BLOCK.as_bytes()) && !secured.messages_hold(b"QEVM"));
        // As documented: a device does not encrypt.
        let ram = std::fs::read(dir.path().join("with TLS/ram")).unwrap();
        let page = ram.chunks(4096).find(|page| page.iter().any(|byte| *byte != 0)).unwrap();
        assert!(secured.pages.windows(64).any(|window| window == &page[..64]));
    }
}

/// Pages and messages are encrypted on the TCP connection on which a migration goes on.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_with_tls_a_migration_that_loses_its_link_goes_on_over_tcp_with_tls() {
    let network = Network::new();
    let dir = scratch();
    let (ram, folder) = (dir.path().join("ram"), dir.path().join("guest"));
    fill(&ram, 8, Pattern::Mixed { seed: 72 });
    let tls = authority(dir.path(), "ours");
    let host = "--tls-hostname=localhost";
    let fallback = ["--reconnect", "60", "--fallback"];
    let more = [&[&tls[..]], &fallback[..], &["tcp:127.0.0.1:0"]].concat();
    let (mut receiver, uri) = receiver(dir.path(), FAR, &more, &folder);
    let told = receiver.errors();
    let there =
        told.lines().find_map(|line| line.strip_prefix("listening for connections after the first on "));
    let more =
        [&[&tls[..], host, "--max-bandwidth", "2M", "--verify", "fast"], &fallback[..], &[there.unwrap()]]
            .concat();
    let mut sender = sender(dir.path(), &uri, &more, &ram);
    network.carries(End::Near, 2 << 20, || sender.errors());
    network.down(End::Near);
    let sent = sender.finished(Deadline::seconds(100), 0);
    let arrived = receiver.finished(Deadline::seconds(20), 0);
    println!("{}", sent["lost-connections"]);
    assert_eq!(
        (&sent["lost-connections"]["count"], &arrived["verified"]),
        (&json!(1), &json!(true)),
        "{sent}"
    );
    compare(&ram, &folder.join("ram-000.bin")).unwrap_or_else(|difference| panic!("{difference:?}"));
}
