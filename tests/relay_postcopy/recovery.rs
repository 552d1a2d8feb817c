//! Where the ends of a lost relay can't reach each other: they go on through `relay --recover`. And relays behind each
//! other.

use super::*;
use crate::preempt::{OPTION, Wire};

/// TLS of the relay that listens, and of the one that connects to it.
#[cfg(feature = "tls")]
fn between(dir: &Path) -> Option<[String; 2]> {
    let authority = crate::common::certificates::Authority::new("the authority");
    let certificates = authority.folder(dir.join("certificates"));
    Some(["--listen-tls-dir", "--tls-dir"].map(|name| format!("{name}={}", certificates.display())))
}

#[cfg(not(feature = "tls"))]
fn between(_dir: &Path) -> Option<[String; 2]> {
    None
}

/// The ends go on through as many other relays, with TLS between them.
fn recover_through(ends: &mut Ends, relays: usize, what: &str) {
    wait_migration_status(&mut ends.destination, "postcopy-paused");
    wait_migration_status(&mut ends.source, "postcopy-paused");
    let dir = ends.dir.path();
    let mut uri = format!("unix:{}", dir.join("again").display());
    ends.destination.execute("migrate-recover", json!({ "uri": uri }));
    let tls = between(dir);
    let mut passages = Vec::new();
    for number in 0..relays {
        let mut options = vec!["--recover"];
        if let Some([listening, connecting]) = &tls {
            options.extend((number + 1 < relays).then_some(listening.as_str()));
            options.extend((number > 0).then_some(connecting.as_str()));
        }
        let mut passage = relay_with(dir, &options, &uri);
        uri = passage.listening();
        passages.push(passage);
    }
    ends.source.execute("migrate", json!({ "uri": uri, "resume": true }));
    ends.source.wait_completed(Deadline::seconds(120));
    ends.destination.wait_completed(Deadline::seconds(30));
    for mut passage in passages {
        let report = passage.finished(Deadline::seconds(30), 0);
        assert_eq!(report["completed"], true, "{what}: {report}");
        assert!(report["passed_bytes"].as_u64().unwrap() > 1 << 20, "{what}: {report}");
    }
    ends.compare(what);
}

#[test]
fn the_ends_go_on_through_another_relay_where_they_can_not_reach_each_other() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        for (capabilities, options) in [(&POSTCOPY[..], &[][..]), (&PREEMPT, &OPTION)] {
            let what = format!("{version}, {capabilities:?}");
            let mut ends = Ends::of(MACHINE, version, capabilities);
            ends.source.set_capabilities(capabilities);
            let mut first = Some(relay_with(ends.dir.path(), options, &ends.far));
            switch(&mut ends.source, &first.as_mut().unwrap().listening());
            wait_migration_status(&mut ends.source, "postcopy-active");
            wait_migration_status(&mut ends.destination, "postcopy-active");
            drop(first.take());
            // Through a relay that is killed, too.
            wait_migration_status(&mut ends.destination, "postcopy-paused");
            wait_migration_status(&mut ends.source, "postcopy-paused");
            let uri = format!("unix:{}", ends.dir.path().join("meanwhile").display());
            ends.destination.execute("migrate-recover", json!({ "uri": uri }));
            let mut second = relay_with(ends.dir.path(), &["--recover"], &uri);
            ends.source.execute("migrate", json!({ "uri": second.listening(), "resume": true }));
            wait_migration_status(&mut ends.source, "postcopy-active");
            second.terminate();
            let said = second.failed(Deadline::seconds(30), 5);
            assert!(said.contains("keep both ends"), "{what}: {said}");
            recover_through(&mut ends, 2, &what);
        }
    }
}

/// A guest goes through two relays, and runs at the far end while its memory comes; and the ends go on if the connection
/// between the relays is lost.
#[test]
fn a_guest_in_postcopy_goes_through_two_relays_and_the_ends_go_on_without_them() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        for (capabilities, options) in [(&POSTCOPY[..], &[][..]), (&PREEMPT, &OPTION)] {
            for cut in [false, true] {
                let what = format!("{version}, {capabilities:?}, cut: {cut}");
                let mut ends = Ends::of(MACHINE, version, capabilities);
                ends.source.set_capabilities(capabilities);
                let mut second = relay_with(ends.dir.path(), options, &ends.far);
                let between = Wire::to(&second.listening());
                let mut first = relay_with(ends.dir.path(), options, &between.address);
                switch(&mut ends.source, &first.listening());
                if !cut {
                    ends.source.wait_completed(Deadline::seconds(120));
                    ends.destination.wait_completed(Deadline::seconds(30));
                    for relay in [&mut first, &mut second] {
                        assert_eq!(relay.finished(Deadline::seconds(30), 0)["completed"], true, "{what}");
                    }
                    ends.compare(&what);
                    continue;
                }
                wait_migration_status(&mut ends.source, "postcopy-active");
                wait_migration_status(&mut ends.destination, "postcopy-active");
                between.cut(0, &what);
                for relay in [&mut first, &mut second] {
                    let said = relay.failed(Deadline::seconds(60), 5);
                    // The second may be in doubt still whether the first knows that the guest was taken.
                    let keeps = said.contains("migrate-recover") || said.contains("keep the source");
                    assert!(keeps, "{what}: {said}");
                }
                recover_through(&mut ends, 1, &what);
            }
        }
    }
}
