//! `ramwire bench latency` and `bandwidth` from end to end: the tests check counts, files and checks, not the figures.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn ramwire(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramwire"));
    // The QEMUs that ci/setup provides are found from the project's root.
    command.current_dir(env!("CARGO_MANIFEST_DIR")).arg("bench").args(arguments);
    command
}

fn json(output: &Output) -> Value {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Percentiles ascend; every sample is counted.
fn check_summary(summary: &Value) -> u64 {
    let names = ["min_us", "p50_us", "p90_us", "p99_us", "p999_us", "max_us"];
    let values: Vec<f64> = names.iter().map(|name| summary[name].as_f64().unwrap()).collect();
    assert!(values.is_sorted() && values[0] > 0.0, "{summary}");
    let count = summary["count"].as_u64().unwrap();
    assert!(count > 0, "{summary}");
    count
}

/// The files of one measurement hold as many samples as its figures state.
fn check_files(prefix: &Path, name: &str, count: u64, corrected: bool) {
    let file = |suffix: &str| {
        let path = format!("{}{suffix}", prefix.display());
        std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
    };
    let kinds: &[&str] = if corrected { &["", ".corrected"] } else { &[""] };
    for kind in kinds {
        let hgrm = file(&format!(".{name}{kind}.hgrm"));
        let last = hgrm.lines().rfind(|line| !line.starts_with('#')).unwrap();
        let last: Vec<f64> = last.split_whitespace().map(|word| word.parse().unwrap()).collect();
        assert_eq!((last[1], last[2]), (1.0, count as f64), "{hgrm}");
    }
    let hlog = file(&format!(".{name}.hlog"));
    let intervals: Vec<&str> = hlog.lines().filter(|line| !line.starts_with(['#', '"'])).collect();
    assert!(!intervals.is_empty() && intervals.iter().all(|line| line.split(',').count() == 4), "{hlog}");
    let svg = file(".svg");
    assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
    let report: Value = serde_json::from_str(&file(".json")).unwrap();
    assert!(!report["cases"].as_array().unwrap().is_empty());
}

#[test]
fn sockets_there_and_back_with_and_without_a_rate() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("lat");
    let output = prefix.to_str().unwrap();
    let paced = ["--rate", "200", "--size", "4K", "--duration", "0.3s", "--json", "--output", output];
    let report = json(&ramwire(&[&["latency", "--transport", "tcp"], &paced[..]].concat()).output().unwrap());
    let case = &report["cases"][0];
    // 200 a second for 0.3 s, all of them, however slow the machine is.
    assert_eq!((check_summary(&case["uncorrected"]), check_summary(&case["corrected"])), (60, 60));
    check_files(&prefix, "tcp-send-4K", 60, true);

    let free = ["latency", "--transport", "unix", "--size", "1,64K", "--duration", "0.1", "--json"];
    let report = json(&ramwire(&free).output().unwrap());
    assert_eq!(report["cases"].as_array().unwrap().len(), 2);
    for case in report["cases"].as_array().unwrap() {
        check_summary(&case["uncorrected"]);
        assert!(case["corrected"].is_null() && case["half_round_trip"] == true, "{case}");
    }
    let text = ramwire(&["latency", "--size", "4K", "--duration", "0.1s"]).output().unwrap();
    let text = String::from_utf8_lossy(&text.stdout).into_owned();
    assert!(text.contains("p99.9") && text.contains("uncorrected") && text.contains(" % #"), "{text}");
}

#[test]
fn a_flow_of_messages_between_two_hosts_ends() {
    let listen = ["latency", "--listen", "127.0.0.1:0"];
    let mut there = ramwire(&listen).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(there.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().strip_prefix("listening ").unwrap().to_owned();
    let flow = ["bandwidth", "--size", "64K", "--duration", "0.2s", "--json", "--connect", &address];
    let report = json(&ramwire(&flow).output().unwrap());
    let case = &report["cases"][0];
    let count = check_summary(&case["uncorrected"]);
    let bytes = case["mb_per_s"].as_f64().unwrap() * 1e6 * case["seconds"].as_f64().unwrap();
    assert!((bytes / 65536.0 - count as f64).abs() < 1.0, "{case}");
    assert!(there.wait().unwrap().success(), "the other end leaves when it is alone");

    let nobody = ramwire(&["latency", "--connect", &address]).output().unwrap();
    assert_eq!(nobody.status.code(), Some(3));
    assert_eq!(ramwire(&["latency", "--size", "0"]).output().unwrap().status.code(), Some(2));
}

#[cfg(feature = "rdma")]
#[test]
fn without_a_device_rdma_says_so() {
    if std::fs::read_dir("/sys/class/infiniband").is_ok_and(|mut devices| devices.next().is_some()) {
        return println!("skipped: this machine has a device");
    }
    let refused = ramwire(&["latency", "--transport", "rdma"]).output().unwrap();
    let errors = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(3) && errors.contains("libibverbs"), "{errors}");
}

#[cfg(feature = "rdma")]
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_every_operation_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let prefix = dir.path().join("rdma");
    let common = ["--transport", "rdma", "--duration", "0.3s", "--json"];
    let latency = ["latency", "--size", "4K", "--output", prefix.to_str().unwrap()];
    let report = json(&ramwire(&[&latency, &common[..]].concat()).output().unwrap());
    let cases = report["cases"].as_array().unwrap();
    let ops: Vec<&str> = cases.iter().map(|case| case["op"].as_str().unwrap()).collect();
    assert_eq!(ops, ["write", "write-complete", "read", "send"]);
    for (case, op) in cases.iter().zip(ops) {
        check_files(&prefix, &format!("rdma-{op}-4K"), check_summary(&case["uncorrected"]), false);
    }
    let bandwidth = ["bandwidth", "--size", "64K", "--depth", "8", "--rate", "100"];
    let report = json(&ramwire(&[&bandwidth, &common[..]].concat()).output().unwrap());
    for case in report["cases"].as_array().unwrap() {
        assert_eq!((check_summary(&case["uncorrected"]), check_summary(&case["corrected"])), (30, 30));
    }
}
