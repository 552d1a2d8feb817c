//! Postcopy with TLS.

use super::*;

/// The guest starts immediately, with its urgent pages on an encrypted connection of their own. Or the connection is
/// lost once, and the source opens another.
#[test]
fn a_postcopy_goes_encrypted_with_urgent_pages_apart_or_over_another_connection() {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let path = |name: &str| dir.path().join(name);
    let certificates = Authority::new("the authority").folder(path("certificates"));
    let tls = format!("--tls-dir={}", certificates.display());
    let (sent, folder) = (path("sent"), path("guest"));
    fill(&sent, 16, Pattern::Mixed { seed: 11 });
    let receive = ["receive", "tcp:127.0.0.1:0", "--json", &tls, "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, &folder);
    let guest = Guest::new(Version::Qemu72, Machine::PcI440fx72, &sent, 16);
    let mut source = encrypting(guest, dir.path(), &certificates);
    source.migrate(&receiver.listening());
    source.wait_completed(Deadline::seconds(60));
    receiver.finished(Deadline::seconds(60), 0);
    source.kill();
    for (version, preempt, lost) in [
        (Version::Qemu72, true, false),
        (Version::Qemu72, false, false),
        (Version::Qemu100, false, true),
        (Version::Newest, true, false),
    ] {
        let what = format!("to {version}, preempt: {preempt}");
        let arrived = path("arrived");
        fill(&arrived, 16, Pattern::Random { seed: 3 });
        let guest = Guest::new(version, Machine::PcI440fx72, &arrived, 16).incoming();
        let mut destination = encrypting(guest, dir.path(), &certificates);
        destination.set_capabilities(if preempt {
            &["postcopy-ram", "postcopy-preempt"]
        } else {
            &["postcopy-ram"]
        });
        let uri = destination.listen_tcp();
        let mut send = vec!["send", &uri, "--json", "--again", "--postcopy", &tls];
        if preempt {
            // The machine's version is 7.2, which is the style for every QEMU; a later QEMU also gets its own style.
            send.extend(["--postcopy-preempt", "--peer", version.peer()]);
        }
        if lost {
            send.extend(["--max-postcopy-bandwidth=4M", "--reconnect=100"]);
        }
        send.push("--dir");
        let mut sender = Ramwire::start(dir.path(), &send, &folder);
        if lost {
            lose_and_recover(&mut destination, &uri, &what);
        }
        let report = sender.finished(Deadline::seconds(120), 0);
        assert_eq!(report["status"], "completed", "{what}: {report}");
        destination.wait_completed(Deadline::seconds(20));
        compare(&sent, &arrived).unwrap_or_else(|d| panic!("{what}: {d:?}"));
        destination.kill();
    }
}

/// Breaks the connection once, and makes the QEMU listen again.
fn lose_and_recover(qemu: &mut Qemu, uri: &str, what: &str) {
    let deadline = Deadline::seconds(100);
    loop {
        let info = qemu.query_migrate();
        let is_lost = qemu.stderr().contains("Migration paused");
        match info["status"].as_str() {
            Some("postcopy-active") if is_lost => return,
            Some("postcopy-active") => drop(qemu.try_execute("migrate-pause", json!({}))),
            Some("postcopy-paused") => drop(qemu.try_execute("migrate-recover", json!({"uri": uri}))),
            _ => {}
        }
        assert!(!deadline.is_over(), "{what}: {info}\n{}", qemu.stderr());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}
