//! `ramwire demo --json`: whole live migrations, and every field of docs/demo-json.md.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod postcopy;

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;

use common::huge_pages::HugePages;
use common::memory::{anonymous_huge_kib, has_huge_pages, huge_pages_not_found};
use common::{Deadline, ramwire::Ramwire, scratch};
use serde_json::Value;

/// The fields in docs/demo-json.md with their types.
fn documented() -> BTreeMap<&'static str, &'static str> {
    let rows = include_str!("../../docs/demo-json.md").lines().filter(|line| line.starts_with("| `"));
    let fields: BTreeMap<_, _> = rows
        .map(|row| {
            let cells: Vec<&str> = row.split('|').map(str::trim).collect();
            (cells[1].trim_matches('`'), cells[2])
        })
        .collect();
    assert!(fields.len() > 30, "the table has another shape now");
    fields
}

/// Every leaf of `value` with its path; `[]` for the items of an array.
fn leaves(path: &str, value: &Value, out: &mut Vec<(String, Value)>) {
    let inside = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    match value {
        Value::Object(fields) => fields.iter().for_each(|(name, value)| leaves(&inside(name), value, out)),
        Value::Array(items) => {
            out.push((path.to_owned(), value.clone()));
            let objects = items.iter().filter(|item| item.is_object());
            objects.for_each(|item| leaves(&format!("{path}[]"), item, out));
        }
        leaf => out.push((path.to_owned(), leaf.clone())),
    }
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "string or null" => value.is_string() || value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_u64(),
        "number" => value.is_f64() || value.is_u64(),
        "number or null" => value.is_f64() || value.is_u64() || value.is_null(),
        "array of string" => value.as_array().is_some_and(|items| items.iter().all(Value::is_string)),
        "array of number" => value.as_array().is_some_and(|items| items.iter().all(Value::is_number)),
        "array of object" => value.as_array().is_some_and(|items| items.iter().all(Value::is_object)),
        other => panic!("docs/demo-json.md has an unknown type: {other}"),
    }
}

fn assert_documented(out: &Value) {
    let fields = documented();
    let mut found = Vec::new();
    leaves("", out, &mut found);
    for (path, value) in &found {
        let kind = fields.get(&**path).unwrap_or_else(|| panic!("{path} is not in docs/demo-json.md"));
        assert!(is_of_type(value, kind), "{path} is no {kind}: {value}");
    }
    // A guest that runs at the destination at once has no round.
    let has_rounds = out["round_log"] != Value::Array(Vec::new());
    let has_recoveries = out["postcopy"]["recoveries"] != Value::Array(Vec::new());
    let has_losses = out["lost"]["last"] != Value::Array(Vec::new());
    let listed = |field: &&&str| {
        (has_losses || !field.starts_with("lost.last[]"))
            && (has_rounds || !field.starts_with("round_log[]"))
            && (has_recoveries || !field.starts_with("postcopy.recoveries[]"))
    };
    for field in fields.keys().filter(listed) {
        assert!(found.iter().any(|(path, _)| path == field), "{field} is not in the output: {out}");
    }
}

/// Runs the demo; whatever the sizes, the guest arrives and checks itself: where it writes faster than a busy machine moves
/// it, too.
fn demo(arguments: &[&str]) -> Value {
    let dir = scratch();
    let bound = ["--timeout=15", "--timeout-action=finish"];
    let arguments: Vec<&str> = ["demo", "--json"].iter().chain(&bound).chain(arguments).copied().collect();
    let out = Ramwire::start(dir.path(), &arguments, "--populate").finished(Deadline::seconds(120), 0);
    assert_documented(&out);
    assert_eq!((&out["verified"], &out["status"]), (&true.into(), &"completed".into()), "{out}");
    assert_eq!((&out["pages_wrong"], &out["error"]), (&0.into(), &Value::Null), "{out}");
    let parts = out["downtime_parts"].as_object().unwrap().values().map(|part| part.as_f64().unwrap());
    let (sum, downtime) = (parts.sum::<f64>(), out["downtime_ms"].as_f64().unwrap());
    assert!((sum - downtime).abs() < 1.0, "the parts make {sum} ms of {downtime}");
    assert_eq!(out["rounds"].as_u64(), out["round_log"].as_array().map(|rounds| rounds.len() as u64));
    out
}

fn pages(mib: u64) -> Value {
    (mib * 256).into()
}

/// A guest that never is clean while it runs: the first round leaves more than a millisecond's work at any speed up to
/// 1 GB/s, and each later one less, where the machine moves it at 40 MB/s or more.
const BUSY: [&str; 6] = ["--working-set", "16M", "--dirty-rate", "30M", "--downtime-ms", "1"];

fn rounds(out: &Value) -> u64 {
    out["rounds"].as_u64().unwrap()
}

#[test]
fn an_idle_guest_converges_at_once() {
    let out = demo(&["--transport", "tcp", "--ram", "48M", "--working-set", "8M", "--dirty-rate", "0"]);
    assert_eq!((rounds(&out), &out["transport"], &out["why"]), (2, &"tcp".into(), &"--transport tcp".into()));
    assert_eq!((&out["digest_compared"], &out["pages_checked"]), (&true.into(), &pages(48)));
    assert!(out["pages"]["zero"].as_u64() > Some(0), "a quarter of the pages is zero: {out}");
}

#[test]
fn page_channels_go_by_tcp_unless_told_otherwise() {
    let out = demo(&["--channels", "2", "--ram", "8M", "--working-set", "1M", "--dirty-rate", "0"]);
    assert_eq!(out["transport"], "tcp", "{out}");
    assert!(out["why"].as_str().unwrap().contains("faster than a UNIX socket"), "{out}");
}

#[test]
#[cfg(feature = "tls")]
fn what_is_wrong_at_the_destination_before_it_listens_is_printed_once() {
    let dir = scratch();
    let said = Ramwire::start(dir.path(), &["demo", "--ram", "8M", "--tls-dir"], dir.path())
        .failed(Deadline::seconds(20), 3);
    assert_eq!(said.matches("ca-cert.pem").count(), 1, "{said}");
}

#[test]
#[cfg(feature = "tls")]
fn a_guest_moves_encrypted_by_every_way_that_has_it() {
    let dir = scratch();
    let folder =
        common::certificates::Authority::new("the authority").folder(dir.path().join("certificates"));
    let tls = format!("--tls-dir={}", folder.display());
    let sizes = ["--ram=32M", "--working-set=4M", "--dirty-rate=10M", &tls];
    let demo = |more: &[&str]| demo(&[&sizes[..], more].concat());
    let out = demo(&["--channels=2"]);
    assert_eq!(out["transport"], "tcp");
    assert!(out["why"].as_str().unwrap().contains("page channels"), "{}", out["why"]);
    let out = demo(&[]);
    assert!(out["why"].as_str().unwrap().contains("encrypts pages on a byte stream only"), "{}", out["why"]);
    demo(&["--transport=unix"]);
    let out = demo(&["--postcopy", "--cut=2"]);
    assert!(out["postcopy"]["faults"].as_u64().unwrap() > 0, "{out}");
}

#[test]
fn a_busy_guest_takes_several_rounds_over_blocks_of_odd_sizes() {
    let blocks = ["--block", "12K", "--block", "5M", "--block", "4K", "--no-digest"];
    let out = demo(&[&["--transport", "unix", "--ram", "45M"], &blocks[..], &BUSY[..]].concat());
    assert!(rounds(&out) >= 3, "{out}");
    assert_eq!(out["pages_checked"], 50 * 256 + 4);
    assert_eq!((&out["transport"], &out["digest_compared"]), (&"unix".into(), &false.into()));
}

#[test]
fn memory_of_huge_pages_converges_at_once_over_unix() {
    if let Some(_pages) = HugePages::reserve(2048, 64) {
        let idle = ["--working-set", "8M", "--dirty-rate", "0", "--block", "12K"];
        let out = demo(&[&["--transport", "unix", "--ram", "32M", "--hugetlb", "2M"], &idle[..]].concat());
        assert_eq!((rounds(&out), &out["pages_checked"]), (2, &(32 * 256 + 3).into()));
    }
}

#[test]
fn memory_of_huge_pages_moves_over_tcp_while_it_is_written() {
    if let Some(_pages) = HugePages::reserve(2048, 64) {
        let huge = ["--transport", "tcp", "--ram", "46M", "--hugetlb", "2M", "--no-digest"];
        // One write makes 2 MiB dirty: the whole working set is, at every sync, and must fit the downtime.
        let busy = ["--working-set", "16M", "--dirty-rate", "30M", "--downtime-ms", "2000"];
        let out = demo(&[&huge[..], &busy[..]].concat());
        let last = out["round_log"].as_array().unwrap().last().unwrap();
        assert!(last["dirty_pages"].as_u64() > Some(0), "it was written until it stood still: {out}");
        assert_eq!(out["pages_checked"], pages(46));
    }
}

#[test]
fn memory_of_pages_of_1_gib_moves_idle_and_written() {
    if let Some(_pages) = HugePages::reserve(1 << 20, 2) {
        let huge =
            ["--ram", "1G", "--hugetlb", "1G", "--block", "12K", "--no-digest", "--downtime-ms", "20000"];
        for busy in
            [["--transport", "unix", "--dirty-rate", "0"], ["--transport", "tcp", "--dirty-rate", "30M"]]
        {
            let out = demo(&[&huge[..], &busy[..], &["--working-set", "16M"]].concat());
            assert_eq!(out["pages_checked"], 1024 * 256 + 3);
        }
    }
}

/// Options that were renamed are still taken, and are no part of the help.
#[test]
fn the_old_spellings_of_huge_pages_are_accepted_and_hidden() {
    let command = |arguments: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_ramwire")).arg("demo").args(arguments).output().unwrap()
    };
    for (old, new) in [(&["--hugepages", "4K"][..], "--hugetlb"), (&["--huge-pages"][..], "--thp")] {
        let refused = command(&[old, &["--no-such-option"]].concat());
        let text = String::from_utf8(refused.stderr).unwrap();
        assert!(text.contains("--no-such-option") && !text.contains(&format!("'{}'", old[0])), "{text}");
        let help = String::from_utf8(command(&["--help"]).stdout).unwrap();
        assert!(help.contains(new) && !help.contains(&format!("{} ", old[0])), "{help}");
    }
}

/// The destination that the demo starts, examined before a guest arrives; and a guest that moves between two such ends.
#[test]
fn private_memory_has_huge_pages_where_they_are_asked_for() {
    if !has_huge_pages() {
        return;
    }
    let dir = scratch();
    let destination = ["demo-destination", "tcp:127.0.0.1:0", "--guest", "synthetic", "--populate"];
    let held = |option: &str| {
        let arguments = [&destination[..], &[option]].concat();
        let destination = Ramwire::start(dir.path(), &arguments, "--block=33554432:4096");
        let out = destination.output();
        let listens = || fs::read_to_string(&out).is_ok_and(|text| text.starts_with("tcp:")).then_some(());
        Deadline::seconds(20).poll("the destination", String::new, listens);
        anonymous_huge_kib(destination.pid())
    };
    for option in ["--thp", "--huge-pages"] {
        let before = huge_pages_not_found();
        let asked = held(option);
        // If memory is fragmented the kernel looks for a huge page and finds none: it was requested nevertheless.
        let given = asked + (huge_pages_not_found() - before) * 2048;
        assert!(
            given >= 16 << 10,
            "{option}: {asked} KiB of 32 MiB are in huge pages; {given} KiB were looked for"
        );
    }
    assert!(held("--block=4096:4096") < 16 << 10, "not unless asked for");
    let busy = ["--working-set", "4M", "--dirty-rate", "30M"];
    let out = demo(&[&["--thp", "--transport", "tcp", "--ram", "32M", "--block", "12K"], &busy[..]].concat());
    assert_eq!(out["pages_checked"], 32 * 256 + 3);
}

/// The VM of docs/examples/tiny-vmm: its vCPUs write, KVM reports which pages, and both the guest and its host check
/// them.
#[test]
fn a_kvm_guest_arrives_whole() {
    let sizes = ["--ram", "15M", "--block", "12K", "--block", "1M", "--working-set", "4M"];
    let writes = ["--dirty-rate", "20M", "--write-size", "64", "--downtime-ms", "50"];
    let out = demo(&[&["--guest", "kvm", "--transport", "unix"], &sizes[..], &writes[..]].concat());
    assert_eq!(out["pages_checked"], 16 * 256 + 3);
    let source = out["dirty_source"].as_str().unwrap();
    assert!(source.starts_with("kvm-ring") || source.starts_with("kvm-log"), "{source}");
    assert!(out["pages"]["normal"].as_u64() > Some(1024), "{out}");
}

/// A guest that stays, and writes while it is written to a file: another guest made of that finds itself whole, and the
/// file's other readers read it.
#[test]
fn a_snapshot_holds_the_whole_guest_whoever_reads_it() {
    let dir = scratch();
    let file = dir.path().join("guest.save");
    let (name, mapped) = (file.display().to_string(), format!("mapped:{}", file.display()));
    let folder = dir.path().join("folder").display().to_string();
    let ramwire = |arguments: &[&str]| {
        let out = Command::new(env!("CARGO_BIN_EXE_ramwire")).args(arguments).output().unwrap();
        let [text, errors] = [out.stdout, out.stderr].map(|text| String::from_utf8(text).unwrap());
        (out.status.code(), text, errors)
    };
    let sizes = ["--ram", "16M", "--block", "12K", "--working-set", "8M"];
    let writes = ["--dirty-rate", "40M", "--write-size", "64"];
    for guest in ["synthetic", "kvm"] {
        let demo = [&["demo", "--guest", guest, "--snapshot", &name], &sizes[..], &writes[..]].concat();
        let (status, text, errors) = ramwire(&demo);
        assert_eq!(status, Some(0), "{text}{errors}");
        assert!(text.contains("checked 4099 pages: 0 wrong"), "{text}");
        let (status, text, errors) = ramwire(&["inspect", &mapped]);
        assert_eq!(status, Some(0), "{errors}");
        assert!(text.contains("bytes, whole") && text.contains("ramwire/devices"), "{text}");
        for way in [&["--restore", &name][..], &["--restore", &name, "--lazy"]] {
            let (status, text, errors) =
                ramwire(&[&["demo", "--guest", guest], way, &sizes[..], &writes[..]].concat());
            assert_eq!(status, Some(0), "{text}{errors}");
            assert!(text.contains("it checked 4099 pages: 0 wrong"), "{text}");
            assert_eq!(text.contains("its memory came within"), way.contains(&"--lazy"), "{text}");
        }
    }
    let (status, text, errors) = ramwire(&["receive", &mapped, "--dir", &folder]);
    assert_eq!(status, Some(0), "{text}{errors}");
    let later = dir.path().join("later.save").display().to_string();
    let mapped_later = format!("mapped:{later}");
    for guest in ["synthetic", "kvm"] {
        let demo =
            [&["demo", "--guest", guest, "--snapshot", &later, "--base", &name], &sizes[..], &writes[..]];
        let (status, text, errors) = ramwire(&demo.concat());
        assert_eq!(status, Some(0), "{text}{errors}");
        assert!(text.contains("checked 4099 pages: 0 wrong"), "{text}");
        let (status, text, errors) = ramwire(&["inspect", &mapped_later]);
        assert_eq!(status, Some(0), "{text}{errors}");
        assert!(text.contains("the changes since") && text.contains("in guest.save"), "{text}");
        let restore = [&["demo", "--guest", guest, "--restore", &later, "--lazy"], &sizes[..], &writes[..]];
        let (status, text, errors) = ramwire(&restore.concat());
        assert_eq!(status, Some(0), "{text}{errors}");
    }
    std::fs::remove_file(&file).unwrap();
    let (status, text, errors) = ramwire(&["inspect", &mapped_later]);
    assert!(status == Some(3) && text.contains("put that one there again"), "{text}{errors}");
    let (status, _, errors) = ramwire(&["demo", "--snapshot", &name, "--postcopy"]);
    assert!(status == Some(2) && errors.contains("--postcopy"), "{errors}");
    let nowhere = dir.path().join("no/folder").display().to_string();
    let (status, _, errors) = ramwire(&["demo", "--ram", "16M", "--snapshot", &nowhere]);
    assert!(status == Some(3) && errors.contains(&nowhere), "{errors}");
}
