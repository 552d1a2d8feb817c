//! Relays with TLS on either side.

use super::*;

/// QEMU -> relay -> QEMU. The far end is told in the clear, or the source is, or neither.
fn relayed(version: Version, channels: u8, encrypted: [bool; 2]) {
    let what = format!("{version}, {channels} channels, TLS: {encrypted:?}");
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let (sent, arrived) = (path("sent"), path("arrived"));
    // Each side has an authority of its own.
    let [near, far] = ["near", "far"].map(|name| Authority::new(name).folder(path(name)));
    fill(&sent, MIB, Pattern::Mixed { seed: 7 });
    fill(&arrived, MIB, Pattern::Zero);
    let guest = |name: &PathBuf| Guest::new(version, Machine::Q35, name, MIB);
    let (mut source, mut destination) = (
        if encrypted[0] {
            encrypting(guest(&sent), dir.path(), &near)
        } else {
            guest(&sent).start(dir.path(), "source")
        },
        if encrypted[1] {
            encrypting(guest(&arrived).incoming(), dir.path(), &far)
        } else {
            guest(&arrived).incoming().start(dir.path(), "destination")
        },
    );
    source.set_capabilities(&["return-path"]);
    multifd(&mut source, channels);
    multifd(&mut destination, channels);
    let (near, far) =
        (format!("--listen-tls-dir={}", near.display()), format!("--tls-dir={}", far.display()));
    let (listens, sends) = (format!("--listen-channels={channels}"), format!("--channels={channels}"));
    let mut relay = vec!["relay", "--json", "--listen=tcp:127.0.0.1:0", &listens, &sends];
    relay.extend(encrypted[0].then_some([near.as_str(), "--listen-tls-authz=client"]).into_iter().flatten());
    relay.extend(encrypted[1].then_some(far.as_str()));
    relay.push("--connect");
    let mut relay = Ramwire::start(dir.path(), &relay, destination.listen_tcp());
    source.migrate(&relay.listening());
    source.wait_completed(Deadline::seconds(90));
    destination.wait_completed(Deadline::seconds(10));
    let report = relay.finished(Deadline::seconds(30), 0);
    assert_eq!(report["completed"], true, "{what}: {report}\n{}", relay.errors());
    assert_eq!(source.status(), "postmigrate", "{what}");
    compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: at the destination: {d:?}"));
}

#[test]
fn a_relay_is_encrypted_on_both_sides_or_on_one_between_every_qemu() {
    if peers_present() {
        for version in Version::ALL {
            relayed(version, 0, [true, true]);
        }
        relayed(Version::Qemu100, 2, [true, true]);
        relayed(Version::Qemu100, 0, [true, false]);
        relayed(Version::Qemu100, 0, [false, true]);
    }
}

/// Before the first page; the guest runs on at its source.
#[test]
fn a_relay_with_tls_refuses_a_source_that_may_switch_to_postcopy() {
    if !peers_present() {
        return;
    }
    for near in [false, true] {
        let dir = scratch();
        let path = |name: &str| dir.path().join(name);
        let certificates = Authority::new("the authority").folder(path("certificates"));
        [path("sent"), path("arrived")].iter().for_each(|ram| fill(ram, MIB, Pattern::Zero));
        let guest = |name| Guest::new(Version::Qemu100, Machine::Q35, path(name), MIB);
        let (mut source, mut destination) = if near {
            let source = encrypting(guest("sent").running(), dir.path(), &certificates);
            (source, guest("arrived").incoming().start(dir.path(), "destination"))
        } else {
            let destination = encrypting(guest("arrived").incoming(), dir.path(), &certificates);
            (guest("sent").running().start(dir.path(), "source"), destination)
        };
        for qemu in [&mut source, &mut destination] {
            qemu.set_capabilities(&["postcopy-ram"]);
        }
        let tls = format!("--{}tls-dir={}", if near { "listen-" } else { "" }, certificates.display());
        let relay = ["relay", "--listen=tcp:127.0.0.1:0", &tls, "--connect"];
        let mut relay = Ramwire::start(dir.path(), &relay, destination.listen_tcp());
        source.migrate(&relay.listening());
        let said = relay.failed(Deadline::seconds(60), 3);
        assert!(said.contains("with TLS on either side; turn postcopy-ram off"), "{said}");
        assert_eq!(source.wait_migration(Deadline::seconds(60))["status"], "failed");
        assert_eq!(source.status(), "running");
    }
}
