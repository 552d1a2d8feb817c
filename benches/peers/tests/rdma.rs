//! Migrations and messages over RDMA compared with other programs, small: the tests check counts and checks, not the
//! figures.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

use serde_json::Value;

fn bench(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire-bench"));
    // The QEMUs that ci/setup provides are found from the project's root.
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).args(arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn without_a_device_it_says_so() {
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some()) {
        return println!("skipped: this machine has a device");
    }
    for arguments in [&["latency"][..], &["migrate", "--transport", "rdma", "--ram", "2M"]] {
        let refused = bench(arguments);
        let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.code() == Some(3) && errors.contains("libibverbs"), "{errors}");
    }
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_writes_are_paired_with_perftests() {
    let report = json(&bench(&["latency", "--size", "4K", "--duration", "0.3", "--pairs", "1", "--json"]));
    assert!(report["cases"][0]["p50_ratio"]["median"].as_f64().unwrap() > 0.0, "{report}");
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_migrations_are_compared_and_counted() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let arguments = ["migrate", "--transport", "rdma", "--ram", "16M", "--pairs", "1", "--json", "--against"];
    let peers = ["qemu10,ib_write_bw", "--pin-all", "--memory-dir", dir.path().to_str().unwrap()];
    let report = json(&bench(&[&arguments[..], &peers].concat()));
    assert_eq!((&report["pin_all"], &report["verified"]), (&true.into(), &true.into()), "{report}");
    let contestants = report["contestants"].as_array().unwrap();
    let names: Vec<_> = contestants.iter().map(|contestant| contestant["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["ramwire", "qemu10", "ib_write_bw"]);
    for contestant in contestants {
        assert!(contestant["mb_per_s"]["median"].as_f64().unwrap() > 0.0, "{contestant}");
    }
    for counted in [&contestants[0]["counted"], &contestants[1]["counted"]] {
        for side in ["source", "destination"] {
            let number = |name: &str| counted[side][name].as_u64().unwrap();
            assert!(number("total") > number("doorbells") && number("doorbells") > 0, "{counted}");
        }
    }
    // 16 MiB in chunks of 1 MiB are at least 16 writes.
    assert!(contestants[0]["counted"]["requests"].as_u64().unwrap() >= 16, "{}", contestants[0]);
    assert!(contestants[2]["counted"].is_null());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_missing_pages_that_are_read_are_paired_with_perftests_reads() {
    let sizes = ["--ram", "16M", "--fault-ram", "2M", "--pairs", "1", "--json"];
    let report = json(&bench(&[&["postcopy", "--transport", "rdma"], &sizes[..]].concat()));
    for ratio in ["rate_ratio", "p50_ratio", "loaded_p99_ratio"] {
        assert!(report[ratio]["median"].as_f64().unwrap() > 0.0, "{ratio}: {report}");
    }
    assert!(report["source_s_per_gb"]["median"].as_f64().unwrap() > 0.0, "{report}");
}
