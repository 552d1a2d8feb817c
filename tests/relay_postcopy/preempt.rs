//! The same with connections for urgent pages (QEMU: postcopy-preempt), from the source to the relay and from there to
//! the far end.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;

pub(crate) const OPTION: [&str; 1] = ["--postcopy-preempt"];

/// The machine types that a pair of versions has: one with the connection right behind the first, and where both have it,
/// one with the connection at the switch.
fn machines(from: Version, to: Version) -> Vec<Machine> {
    let late = from == to && from != Version::Qemu72;
    [Some(MACHINE), late.then_some(Machine::Q35)].into_iter().flatten().collect()
}

fn urgent_pages_go_through(images: &Images, from: Version, to: Version) {
    for machine in machines(from, to) {
        let what = format!("{from} to {to}, {}", machine.name());
        let mut live = Live::start(images, machine, (from, to), &PREEMPT);
        let mut relay = relay_with(live.dir.path(), &OPTION, &live.far);
        switch(&mut live.source, &relay.listening());
        live.runs_there(&what);
        let info = live.source.wait_completed(Deadline::seconds(120));
        let report = relay.finished(Deadline::seconds(30), 0);
        live.destination.wait_completed(Deadline::seconds(30));
        live.is_unbroken(&what);
        let (came, left) = (&report["received_urgent_pages"], &report["far"]["urgent-pages"]);
        println!(
            "{what}: downtime {} ms, {} requests to the source, {} to the relay, {came} urgent pages came, {left} left",
            info["downtime"], info["ram"]["postcopy-requests"], report["far"]["ram"]["postcopy-requests"]
        );
        assert_eq!(report["completed"], true, "{what}: {report}");
        assert!(came.as_u64().unwrap() > 0, "{what}: none came as an urgent one: {report}");
        assert!(left.as_u64().unwrap() > 0, "{what}: none left as an urgent one: {report}");
    }
}

#[test]
fn urgent_pages_go_through_a_relay_on_connections_of_their_own_between_two_qemu_72() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    urgent_pages_go_through(&images, Version::Qemu72, Version::Qemu72);
}

#[test]
fn urgent_pages_go_through_a_relay_on_connections_of_their_own_between_two_qemu_100() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    urgent_pages_go_through(&images, Version::Qemu100, Version::Qemu100);
}

#[test]
fn urgent_pages_go_through_a_relay_on_connections_of_their_own_between_two_of_the_newest_qemu() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    urgent_pages_go_through(&images, Version::Newest, Version::Newest);
}

#[test]
fn urgent_pages_go_through_a_relay_on_connections_of_their_own_between_versions() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    for (from, to) in Version::pairs() {
        urgent_pages_go_through(&images, from, to);
    }
}

/// Two relays behind each other, each with connections for urgent pages; and a source that has none, whose pages all come
/// in its stream.
#[test]
fn urgent_pages_go_through_two_relays_and_from_a_source_without_a_connection_for_them() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    for version in Version::ALL {
        for behind_each_other in [true, false] {
            let what = format!("{version}, two relays: {behind_each_other}");
            let mut live = Live::start(&images, MACHINE, (version, version), &PREEMPT);
            if !behind_each_other {
                live.source.set_capability("postcopy-preempt", false);
            }
            let mut second = relay_with(live.dir.path(), &OPTION, &live.far);
            let to_second = second.listening();
            let mut first = behind_each_other.then(|| relay_with(live.dir.path(), &OPTION, &to_second));
            let uri = first.as_mut().map_or(to_second, Ramwire::listening);
            switch(&mut live.source, &uri);
            live.runs_there(&what);
            live.source.wait_completed(Deadline::seconds(120));
            let report = second.finished(Deadline::seconds(30), 0);
            if let Some(mut first) = first {
                let report = first.finished(Deadline::seconds(30), 0);
                assert!(report["far"]["urgent-pages"].as_u64().unwrap() > 0, "{what}: {report}");
            }
            live.destination.wait_completed(Deadline::seconds(30));
            live.is_unbroken(&what);
            let came = report["received_urgent_pages"].as_u64().unwrap();
            assert_eq!(came > 0, behind_each_other, "{what}: {report}");
            assert!(report["far"]["urgent-pages"].as_u64().unwrap() > 0, "{what}: {report}");
        }
    }
}

/// Passes connections on, in their order, and can cut one of them.
pub(crate) struct Wire {
    pub(crate) address: String,
    made: Arc<Mutex<Vec<Pair>>>,
}

struct Pair {
    ends: [TcpStream; 2],
    /// Bytes that went towards the listener.
    passed: Arc<AtomicU64>,
}

impl Wire {
    pub(crate) fn to(uri: &str) -> Self {
        let target = uri.strip_prefix("tcp:").unwrap().to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("tcp:{}", listener.local_addr().unwrap());
        let made = Arc::<Mutex<Vec<Pair>>>::default();
        let pairs = Arc::clone(&made);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (Ok(near), Ok(far)) = (near, TcpStream::connect(&target)) else { return };
                let passed = Arc::<AtomicU64>::default();
                pass(&near, &far, Arc::clone(&passed));
                pass(&far, &near, Arc::default());
                pairs.lock().unwrap().push(Pair { ends: [near, far], passed });
            }
        });
        Self { address, made }
    }

    /// Waits until bytes have gone over the connection of this number, and cuts it.
    pub(crate) fn cut(&self, number: usize, what: &str) {
        let made = || self.made.lock().unwrap();
        let goes = || made().get(number).filter(|pair| pair.passed.load(Ordering::Relaxed) > 0).map(|_| ());
        let said = || format!("{} connections", made().len());
        Deadline::seconds(120).poll(&format!("{what}: bytes on connection {number}"), said, goes);
        made()[number].ends.iter().for_each(|end| drop(end.shutdown(Shutdown::Both)));
    }
}

fn pass(from: &TcpStream, to: &TcpStream, passed: Arc<AtomicU64>) {
    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
    std::thread::spawn(move || {
        let mut buffer = [0; 64 << 10];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            if to.write_all(&buffer[..got]).is_err() {
                // As a network without this wire: who writes sees it.
                let _ = from.shutdown(Shutdown::Both);
            }
            passed.fetch_add(got as u64, Ordering::Relaxed);
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Where a connection for urgent pages is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    FarEnd,
}

/// A lost connection for urgent pages ends the relay, which says what to do, and the ends go on without it: the guest
/// runs at the far end all the time.
fn goes_on_without(images: &Images, version: Version, machine: Machine, side: Side) {
    let what = format!("{version}, {}, {side:?}", machine.name());
    let mut live = Live::start(images, machine, (version, version), &PREEMPT);
    // So slow that the guest waits for pages for a long time.
    slow(&mut live.source, 4 << 20);
    let behind = (side == Side::FarEnd).then(|| Wire::to(&live.far));
    let far = behind.as_ref().map_or(&live.far, |wire| &wire.address);
    let mut relay = relay_with(live.dir.path(), &OPTION, far);
    let listening = relay.listening();
    let before = (side == Side::Source).then(|| Wire::to(&listening));
    switch(&mut live.source, before.as_ref().map_or(&listening, |wire| &wire.address));
    live.runs_there(&what);
    before.or(behind).unwrap().cut(1, &what);
    let said = relay.failed(Deadline::seconds(60), 5);
    assert!(said.contains("migrate-recover"), "{what}: {said}");
    slow(&mut live.source, 0);
    recover(&mut live.source, &mut live.destination, live.dir.path());
    live.is_unbroken(&what);
}

#[test]
fn the_ends_go_on_without_a_relay_that_lost_a_connection_for_urgent_pages() {
    let Some(images) = peers_present().then(writer::images).flatten() else { return };
    for version in Version::ALL {
        for machine in machines(version, version) {
            for side in [Side::Source, Side::FarEnd] {
                goes_on_without(&images, version, machine, side);
            }
        }
    }
}
