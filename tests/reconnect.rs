//! `ramwire send` and `ramwire receive` over a network that fails before the guest is there: the source connects again,
//! nothing is lost, and no more goes twice than was not confirmed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, Weak};

use common::memory::{MIB, Pattern, compare, fill};
use common::{Deadline, ramwire::Ramwire, scratch};
use serde_json::{Value, json};

/// When a connection breaks.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// It has carried so many bytes to the destination, and its answer to the setup.
    After(u64),
    /// COMMIT is to be carried.
    BeforeCommit,
    /// At once, and so are all connections after it.
    Nowhere,
    Never,
}

/// First bytes of COMMIT and of FENCED.
const COMMIT: &[u8] = &[8, 0x52, 4, 0, 16];
const FENCED: &[u8] = &[0x52, 6, 0, 8];

/// Finds a word in bytes that come in pieces.
struct Finder {
    word: &'static [u8],
    tail: Vec<u8>,
}

impl Finder {
    fn of(word: &'static [u8]) -> Self {
        Self { word, tail: Vec::new() }
    }

    /// Where it begins in `bytes`, which may be before their start.
    fn find(&mut self, bytes: &[u8]) -> Option<usize> {
        let before = self.tail.len();
        self.tail.extend_from_slice(bytes);
        let found = self.tail.windows(self.word.len()).position(|word| word == self.word);
        let kept = self.tail.len().min(self.word.len() - 1);
        self.tail.drain(..self.tail.len() - kept);
        found.map(|at| at.saturating_sub(before))
    }
}

/// One connection, until it breaks or ends.
fn carry(near: TcpStream, far: TcpStream, cut: Cut) {
    let (told, hears): (Sender<()>, Receiver<()>) = channel();
    let (mut from_far, mut to_near) = (far.try_clone().unwrap(), near.try_clone().unwrap());
    let back = std::thread::spawn(move || {
        let (mut finder, mut bytes) = (Finder::of(FENCED), [0; 4096]);
        while let Ok(count @ 1..) = from_far.read(&mut bytes) {
            if to_near.write_all(&bytes[..count]).is_err() {
                break;
            }
            if finder.find(&bytes[..count]).is_some() {
                let _ = told.send(());
            }
        }
        let _ = to_near.shutdown(Shutdown::Write);
    });
    let (mut from_near, mut to_far) = (&near, &far);
    let (mut commit, mut bytes, mut carried) = (Finder::of(COMMIT), vec![0; 64 << 10], 0);
    let breaks = loop {
        let Ok(count @ 1..) = from_near.read(&mut bytes) else { break false };
        let found = commit.find(&bytes[..count]);
        let passes = match (cut, found) {
            (Cut::After(most), _) => count.min(usize::try_from(most - carried).unwrap()),
            (Cut::BeforeCommit, Some(at)) => at,
            _ => count,
        };
        if to_far.write_all(&bytes[..passes]).is_err() {
            break false;
        }
        carried += passes as u64;
        match (cut, found) {
            (Cut::After(most), _) if carried == most => break true,
            (Cut::BeforeCommit, Some(_)) => break false,
            _ => {}
        }
    };
    if breaks {
        // The other direction has what it needs.
        let _ = hears.recv();
    }
    if !matches!(cut, Cut::Never) {
        let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
    } else {
        let _ = far.shutdown(Shutdown::Write);
    }
    drop(back.join());
}

/// A way to `far` whose connections break one after the other; behind the last nobody is reached any more.
fn way_to(far: SocketAddr, cuts: Vec<Cut>) -> (SocketAddr, Arc<Mutex<usize>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, taken) = (listener.local_addr().unwrap(), Arc::new(Mutex::new(0)));
    let counts = Arc::clone(&taken);
    std::thread::spawn(move || {
        for cut in cuts {
            let Ok((near, _)) = listener.accept() else { return };
            *counts.lock().unwrap() += 1;
            if matches!(cut, Cut::Nowhere) {
                drop(near);
                while listener.accept().is_ok() {}
                return;
            }
            let Ok(far) = TcpStream::connect(far) else { return };
            carry(near, far, cut);
        }
    });
    (address, taken)
}

fn ram_file(folder: &Path) -> std::path::PathBuf {
    let text = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(manifest["state"], "whole", "{manifest}");
    folder.join(manifest["blocks"][0]["file"].as_str().unwrap())
}

const SIZE: usize = 24;

/// Sends a guest, by ways that `ways` makes to the destination, with `more` arguments at both ends; the source's report.
fn send_by(ways: impl FnOnce(SocketAddr) -> Vec<SocketAddr>, verify: &str, more: &[&str]) -> Value {
    let dir = scratch();
    let (memory, folder) = (dir.path().join("memory"), dir.path().join("guest"));
    fill(&memory, SIZE, Pattern::Mixed { seed: 5 });
    let arguments =
        [&["receive", "tcp:127.0.0.1:0", "--reconnect", "100", "--json"], more, &["--dir"]].concat();
    let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
    let far: SocketAddr = receiver.listening().strip_prefix("tcp:").unwrap().parse().unwrap();
    let ways: Vec<_> = ways(far).iter().map(|way| format!("tcp:{way}")).collect();
    let ram = format!("m0={}", memory.display());
    let arguments = ["send", "--ram", &ram, "--reconnect", "100", "--verify", verify, "--json"];
    let mut arguments = [&arguments[..], more].concat();
    ways[1..].iter().for_each(|other| arguments.extend(["--fallback", other]));
    let mut sender = Ramwire::start(dir.path(), &arguments, &ways[0]);
    let sent = sender.finished(Deadline::seconds(100), 0);
    let arrived = receiver.finished(Deadline::seconds(100), 0);
    assert_eq!((&sent["status"], &arrived["arrived"]), (&json!("completed"), &json!(true)), "{sent}");
    assert_eq!(arrived["verified"], json!(verify != "off"), "{arrived}");
    compare(&memory, &ram_file(&folder)).unwrap_or_else(|found| panic!("{sent}: {found:?}"));
    sent
}

/// Sends a guest over connections that break as in `cuts`, the last ones by another address; the source's report.
fn send(cuts: &[Cut], fallback: &[Cut], verify: &str) -> Value {
    let mut taken = Vec::new();
    let mut way = |far, cuts: &[Cut]| {
        let (address, count) = way_to(far, cuts.to_vec());
        taken.push(count);
        address
    };
    let ways =
        |far| [cuts, fallback].iter().filter(|cuts| !cuts.is_empty()).map(|cuts| way(far, cuts)).collect();
    let sent = send_by(ways, verify, &[]);
    let taken: usize = taken.iter().map(|count| *count.lock().unwrap()).sum();
    assert_eq!(taken, cuts.len() + fallback.len());
    let lost = &sent["lost-connections"];
    // An address that nobody serves any more may take a connection, and drop it.
    let (count, cut) = (lost["count"].as_u64().unwrap(), (cuts.len() + fallback.len() - 1) as u64);
    assert!(count == cut || !fallback.is_empty() && count > cut, "{lost}");
    assert_eq!(sent["ram"]["total"], json!(SIZE * MIB));
    sent
}

/// What breaks of a connection with page channels.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Part {
    All,
    Main,
    Channel,
    /// Nothing more is carried, and nobody is told.
    Silence,
}

/// Both ends of a connection that is carried; it is closed when nobody carries it any more.
type Pair = Arc<(TcpStream, TcpStream)>;

/// A way to `far` whose first `connections` break together, when they have carried so many bytes or are to carry COMMIT;
/// the first one is the main one. Those that follow are whole.
fn way_of_channels(far: SocketAddr, connections: usize, part: Part, most: Option<u64>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        let carried = |_| Arc::new((listener.accept().unwrap().0, TcpStream::connect(far).unwrap()));
        let pairs: Vec<Pair> = (0..connections).map(carried).collect();
        let others: Vec<Weak<_>> = pairs.iter().map(Arc::downgrade).collect();
        let sum = Arc::new(Mutex::new(Some(0)));
        for (at, pair) in pairs.into_iter().enumerate() {
            let (sum, others, back) = (Arc::clone(&sum), others.clone(), Arc::clone(&pair));
            let is_main = at == 0;
            std::thread::spawn(move || pump(&pair, &others, &sum, (part, most.ok_or(is_main))));
            std::thread::spawn(move || drop(std::io::copy(&mut &back.1, &mut &back.0)));
        }
        while let Ok((near, _)) = listener.accept() {
            let Ok(far) = TcpStream::connect(far) else { return };
            carry(near, far, Cut::Never);
        }
    });
    address
}

/// Carries what comes for the destination on one of several connections, until they break: at so many bytes of all, or
/// where COMMIT is on this one.
fn pump(
    pair: &Pair,
    all: &[Weak<(TcpStream, TcpStream)>],
    sum: &Mutex<Option<u64>>,
    (part, breaks): (Part, Result<u64, bool>),
) {
    let (mut near, mut far) = (&pair.0, &pair.1);
    let (mut commit, mut bytes) = (Finder::of(COMMIT), vec![0; 16 << 10]);
    while let Ok(count @ 1..) = near.read(&mut bytes) {
        let found = commit.find(&bytes[..count]).is_some();
        let due = {
            let mut sum = sum.lock().unwrap();
            let carried = sum.map(|sum| sum + count as u64);
            let due = carried.is_some_and(|carried| match breaks {
                Ok(most) => carried >= most,
                Err(here) => here && found,
            });
            *sum = carried.filter(|_| !due);
            // Before the others carry on: nothing of what broke is carried then.
            if due && part != Part::Silence {
                let broken = match part {
                    Part::Channel => &all[1..2],
                    Part::Main => &all[..1],
                    _ => all,
                };
                for pair in broken.iter().filter_map(Weak::upgrade) {
                    let _ = (pair.0.shutdown(Shutdown::Both), pair.1.shutdown(Shutdown::Both));
                }
            }
            due || sum.is_none() && part == Part::Silence
        };
        if due && part == Part::Silence {
            // Its ends are held, and hear nothing.
            loop {
                std::thread::park();
            }
        }
        if far.write_all(&bytes[..count]).is_err() {
            return;
        }
    }
}

/// Whatever breaks of a connection with page channels, they go on over one that has none.
#[test]
fn a_connection_with_page_channels_is_followed_by_one_without() {
    let all = (SIZE * MIB / 4096) as u64;
    let early = Some(600_000);
    let late = Some((SIZE * MIB / 3) as u64);
    for (part, most, verify) in [
        (Part::Main, late, "full"),
        (Part::All, early, "off"),
        (Part::All, late, "fast"),
        (Part::Channel, early, "fast"),
        (Part::Channel, late, "off"),
    ] {
        let ways = |far| vec![way_of_channels(far, 3, part, most)];
        let sent = send_by(ways, verify, &["--channels", "2"]);
        let lost = &sent["lost-connections"];
        println!("{part:?} {most:?} {verify}: {lost}");
        let again = lost["pages_again"].as_u64().unwrap();
        // What page channels have placed does not go again, whatever the stream has confirmed.
        assert!(lost["count"] == json!(1) && again <= all, "{lost}");
    }
}

/// Nobody is told that the connection is dead: the source finds it out by its own time, the destination by the next one.
#[test]
fn a_network_that_falls_silent_is_left_for_another_connection() {
    let ways = |far| vec![way_of_channels(far, 3, Part::Silence, Some(2_000_000))];
    let sent = send_by(ways, "fast", &["--channels", "2", "--stall-timeout", "3"]);
    println!("{}", sent["lost-connections"]);
    assert_eq!(sent["lost-connections"]["count"], json!(1), "{sent}");
}

/// COMMIT does not arrive on a connection with page channels: the guest is asked for.
#[test]
fn a_loss_at_commit_with_page_channels_leaves_no_doubt() {
    let ways = |far| vec![way_of_channels(far, 3, Part::All, None)];
    let lost = send_by(ways, "fast", &["--channels", "2"])["lost-connections"].clone();
    assert_eq!((&lost["last"][0]["committed"], &lost["pages_again"]), (&json!(true), &json!(0)), "{lost}");
}

#[test]
fn connections_that_break_again_and_again_lose_no_page() {
    const HALF: u64 = (SIZE * MIB / 5) as u64;
    for verify in ["off", "fast", "full"] {
        let cuts = [Cut::After(20_000), Cut::After(HALF), Cut::After(3_000_000), Cut::Never];
        let lost = send(&cuts, &[], verify)["lost-connections"].clone();
        println!("{verify}: {lost}");
        assert!(lost["pages_again"].as_u64().unwrap() > 0, "{lost}");
        for one in lost["last"].as_array().unwrap() {
            assert!(one["took_ms"].as_f64() > Some(0.0) && one["committed"] == json!(false), "{one}");
            assert!(one["pages_again"].as_u64().unwrap() < (SIZE * MIB / 4096) as u64, "{one}");
        }
    }
}

#[test]
fn a_destination_is_reached_by_another_address() {
    let lost = send(&[Cut::After(1_000_000)], &[Cut::Never], "off");
    println!("{}", lost["lost-connections"]);
}

#[test]
fn an_address_that_takes_connections_and_leads_nowhere_is_left_for_another() {
    let lost = send(&[Cut::After(1_000_000), Cut::Nowhere], &[Cut::Never], "off");
    println!("{}", lost["lost-connections"]);
}

/// COMMIT does not arrive: the guest is asked for, which is COMMIT again.
#[test]
fn a_loss_at_commit_leaves_no_doubt() {
    let lost = send(&[Cut::BeforeCommit, Cut::Never], &[], "off")["lost-connections"].clone();
    println!("{lost}");
    assert_eq!((&lost["last"][0]["committed"], &lost["pages_again"]), (&json!(true), &json!(0)), "{lost}");
}

/// The destination was not asked to wait: the source is told at once, not when the connection is lost.
#[test]
fn a_destination_that_waits_for_nobody_is_told_of_once() {
    let dir = scratch();
    let memory = dir.path().join("memory");
    fill(&memory, 1, Pattern::Mixed { seed: 5 });
    let ram = format!("m0={}", memory.display());
    for (more, told) in [(&[][..], 1), (&["--reconnect", "100"], 0)] {
        let folder = dir.path().join(format!("guest{told}"));
        let arguments = [&["receive", "tcp:127.0.0.1:0"], more, &["--dir"]].concat();
        let mut receiver = Ramwire::start(dir.path(), &arguments, &folder);
        let far = receiver.listening();
        let mut sender = Ramwire::start(dir.path(), &["send", "--ram", &ram, "--reconnect", "100"], &far);
        let said = sender.failed(Deadline::seconds(100), 0);
        receiver.failed(Deadline::seconds(100), 0);
        assert_eq!(said.matches("--reconnect has no effect here").count(), told, "{said}");
    }
}
