//! `ramwire-bench` from end to end, small: the tests check its checks, not its figures.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::Value;

fn bench(memory_dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire-bench"));
    // The QEMUs that ci/setup provides are found from the project's root.
    command.current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."));
    command.args(["migrate", "--memory-dir"]).arg(memory_dir);
    command.args(arguments).output().unwrap()
}

fn left_over(dir: &Path) -> usize {
    std::fs::read_dir(dir).unwrap().count()
}

#[test]
fn every_peer_moves_the_memory_and_its_figures_are_paired() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let peers = [
        "qemu10",
        "qemu72",
        "qemu10:2",
        "floor",
        "floor-packet",
        "floor-direct",
        "memcpy",
        "sweep",
        "ramwire:2",
        "ramwire+unix+whole",
    ];
    let drawn = tempfile::tempdir().unwrap();
    let all = [("yes", "shared"), ("backed", "shared"), ("no", "shared"), ("yes", "huge"), ("no", "huge")];
    for (populated, memory) in all {
        let against = peers.join(",");
        let arguments = ["--ram", "32M", "--fill", "mixed:70", "--pairs", "2", "--json"];
        let also = ["--against", &against, "--populated", populated, "--memory", memory];
        let picture = drawn.path().join("bars.svg");
        let svg = ["--svg", picture.to_str().unwrap()];
        let output = bench(dir.path(), &[&arguments[..], &also, &svg].concat());
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&report["ram_bytes"], &report["verified"]), (&(32 << 20).into(), &true.into()));
        assert_eq!((&report["populated"], &report["memory"]), (&populated.into(), &memory.into()));
        let picture = std::fs::read_to_string(picture).unwrap();
        assert!(picture.contains("<svg") && peers.iter().all(|peer| picture.contains(peer)), "{picture}");
        let contestants = report["contestants"].as_array().unwrap();
        let names: Vec<_> = contestants.iter().map(|c| c["name"].as_str().unwrap()).collect();
        // A bare loop's name also contains its buffer.
        let first_words: Vec<_> = names.iter().map(|name| name.split(' ').next().unwrap()).collect();
        assert_eq!((first_words[0], &first_words[1..]), ("ramwire", &peers[..]));
        for contestant in contestants {
            assert_eq!(contestant["runs"].as_array().unwrap().len(), 2, "{contestant}");
            assert!(contestant["gb_per_s"]["median"].as_f64().unwrap() > 0.0, "{contestant}");
            let fills = !["memcpy", "sweep"].contains(&contestant["name"].as_str().unwrap());
            let told = contestant["populate_gb_per_s"]["median"].as_f64().is_some();
            assert_eq!(told, fills && populated == "no", "{contestant}");
            assert_eq!(contestant["destination_cpu_s_per_gb"].is_object(), fills, "{contestant}");
            assert!(contestant["page_faults_per_gb"].is_object(), "{contestant}");
        }
        for pair in 0..2 {
            let seconds = |at: usize| contestants[at]["runs"][pair]["seconds"].as_f64().unwrap();
            let ratio = &contestants[4]["throughput_ratio"];
            if ratio.is_null() {
                assert_eq!(contestants[4]["pairs_dropped"], 2);
                continue;
            }
            if contestants[4]["pairs_dropped"] != 0 {
                continue;
            }
            let (low, high) = (ratio["low"].as_f64().unwrap(), ratio["high"].as_f64().unwrap());
            assert!((low - 1e-9..=high + 1e-9).contains(&(seconds(4) / seconds(0))), "{ratio}");
        }
    }
    assert_eq!(left_over(dir.path()), 0);
}

#[test]
fn what_is_missing_or_too_small_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let missing = bench(dir.path(), &["--ram", "2M", "--against", "qemu10", "--qemu100", "/none"]);
    assert_eq!(missing.status.code(), Some(3));
    let errors = String::from_utf8_lossy(&missing.stderr).into_owned();
    assert!(errors.contains("QEMU 10.0 was not found") && errors.contains("--qemu100"), "{errors}");
    let none = dir.path().join("none");
    let no_room = bench(&none, &["--ram", "2M", "--against", "memcpy"]);
    let errors = String::from_utf8_lossy(&no_room.stderr).into_owned();
    assert!(errors.contains("--memory-dir"), "{errors}");
    assert_eq!(left_over(dir.path()), 0);
    assert_eq!(bench(dir.path(), &["--against", "xen"]).status.code(), Some(2));
    let backed = bench(
        dir.path(),
        &["--ram", "2M", "--against", "floor", "--memory", "huge", "--populated", "backed"],
    );
    assert!(String::from_utf8_lossy(&backed.stderr).contains("--populated yes or no"), "{backed:?}");
}

#[test]
fn a_ramwire_that_is_not_there_is_named() {
    let arguments = ["limit", "--limit=8M", "--seconds=1", "--ramwire=/none"];
    let output = Command::new(env!("CARGO_BIN_EXE_ramwire-bench")).args(arguments).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(3) && errors.contains("--ramwire"), "{errors}");
}

/// A signal ends the bench after the current run at the latest, and no memory is left over.
#[test]
fn a_signal_cancels_and_frees_the_memory() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ramwire-bench"))
        .args(["migrate", "--ram", "16M", "--pairs", "9999", "--against", "floor", "--memory-dir"])
        .arg(dir.path())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let until = Instant::now() + Duration::from_secs(60);
    while left_over(dir.path()) == 0 {
        assert!(Instant::now() < until && child.try_wait().unwrap().is_none(), "no memory is made");
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = rustix::process::Pid::from_raw(child.id().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(4));
    assert_eq!(left_over(dir.path()), 0);
}

/// The other benches from end to end, small: a guest that arrives by itself, and a limit that is measured briefly. They
/// run the command, which `cargo test --workspace` builds next to this program.
#[test]
fn converging_and_limited_demos_are_measured() {
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_ramwire-bench")).args(arguments).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        serde_json::from_slice::<Value>(&output.stdout).unwrap_or_else(|error| panic!("{error}: {errors}"))
    };
    let drawn = tempfile::tempdir().unwrap();
    let small = ["converge", "--json", "--runs=1", "--rates=0.1", "--means=none,xbzrle", "--ram=16M"];
    let folder = drawn.path().to_str().unwrap();
    let cells = run(&[&small[..], &["--working-set=4M", "--pictures", folder]].concat());
    for cell in cells.as_array().unwrap() {
        assert_eq!((&cell["converged"], &cell["sound"]), (&1.into(), &true.into()), "{cell}");
        assert!(cell["each"][0]["downtime_parts"].is_object(), "{cell}");
    }
    assert_eq!((cells.as_array().unwrap().len(), left_over(drawn.path())), (2, 2), "a line chart and bars");
    let held = run(&["limit", "--json", "--limit=8M", "--seconds=2"]);
    assert!(held["windows"].as_u64() >= Some(5) && held["rate"].as_f64() > Some(0.0), "{held}");
}

#[test]
fn snapshots_are_measured_in_turns_and_their_files_removed() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire-bench"));
    command.args(["snapshot", "--ram", "8M,16M", "--pairs", "2", "--working-set", "2M", "--json", "--dir"]);
    let output = command.arg(dir.path()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    // 3: it measured, and a limit did not hold, as on a busy machine.
    assert!(matches!(output.status.code(), Some(0 | 3)), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    let cases = report["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 2);
    for case in cases {
        assert_eq!(case["runs"].as_array().unwrap().len(), 2, "{case}");
        assert!(case["pause_ms"]["median"].as_f64().unwrap() > 0.0, "{case}");
    }
    assert_eq!(left_over(dir.path()), 0);
}

#[test]
fn restores_are_measured_beside_bare_reads_and_their_files_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire-bench"));
    command.args(["restore", "--ram", "16M", "--sparse", "1G", "--pairs", "2", "--json", "--dir"]);
    let output = command.arg(dir.path()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(0 | 3)), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{errors}"));
    for name in ["eager_gb_per_s", "bare_gb_per_s", "eager_ratio", "lazy_start_ms", "sparse_start_ms"] {
        assert_eq!(report[name]["count"], 2, "{name}: {report}");
    }
    assert_eq!(left_over(dir.path()), 0);
}
