//! The figures: field by field compared with a QEMU's `query-migrate`, and number by number in migrations of known
//! size.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use common::{
    Deadline,
    memory::{MIB, Pattern, fill},
    qemu::{Guest, Machine, Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use ramwire::observe::{DeltaCounts, PageWaits, Statistics, Status, VcpuWaits};
use serde_json::{Value, json};

/// First column of the tables in docs/statistics.md whose header begins with `header`.
fn documented(header: &str) -> Vec<&'static str> {
    let mut lines = include_str!("../docs/statistics.md").lines();
    lines.find(|line| line.starts_with(&format!("| {header} |"))).expect("the table is there");
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.split('`').nth(1).expect("a name in backticks")).collect()
}

/// Every leaf of an object with its path.
fn leaves(value: &Value) -> BTreeMap<String, &Value> {
    fn walk<'a>(path: &str, value: &'a Value, out: &mut BTreeMap<String, &'a Value>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                    walk(&path, value, out);
                }
            }
            leaf => drop(out.insert(path.to_owned(), leaf)),
        }
    }
    let mut out = BTreeMap::new();
    walk("", value, &mut out);
    out
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// Our fields in every state that shows any.
fn ours() -> BTreeMap<String, Value> {
    let deltas = DeltaCounts { cache_size: 1 << 20, ..DeltaCounts::default() };
    let mut active = Statistics::default();
    active.status = Status::Active;
    active.throttle_percent = 20;
    active.deltas = deltas;
    active.error = Some("why".into());
    active.expected_downtime = Some(300.0);
    let mut completed = Statistics::default();
    completed.status = Status::Completed;
    let mut waits = PageWaits::default();
    waits.vcpus.push(VcpuWaits::default());
    completed.page_waits = Some(waits);
    let mut out = BTreeMap::new();
    for statistics in [active, completed] {
        let shape = statistics.query_migrate();
        out.extend(leaves(&shape).into_iter().map(|(path, value)| (path, value.clone())));
    }
    out
}

#[test]
fn the_table_names_our_fields_and_no_others() {
    let mut table = documented("field");
    table.sort_unstable();
    assert_eq!(ours().keys().map(String::as_str).collect::<Vec<_>>(), table);
}

/// Answers of a QEMU: while it migrates, after completion, after a failure, and its destination's.
fn answers_of_qemu(version: Version, dir: &Path, capabilities: &[&str]) -> Vec<Value> {
    let (sent, arrived) = (dir.join("sent"), dir.join("arrived"));
    fill(&sent, 32, Pattern::Random { seed: 3 });
    fill(&arrived, 32, Pattern::Zero);
    let guest = |ram: &Path| Guest::new(version, Machine::Q35, ram, 32);
    let mut destination = guest(&arrived).incoming().start(dir, "destination");
    let mut source = guest(&sent).start(dir, "source");
    destination.set_capabilities(capabilities);
    source.set_capabilities(capabilities);
    let uri = destination.listen_tcp();
    let mut answers = vec![destination.query_migrate()];
    source.migrate("tcp:127.0.0.1:1");
    answers.push(source.wait_migration(Deadline::seconds(20)));
    source.set_parameters(json!({"max-bandwidth": 1 << 20}));
    source.migrate(&uri);
    let active = Deadline::seconds(10).poll("active", String::new, || {
        let answer = source.query_migrate();
        let begun = answer["status"] == "active" && answer["ram"]["transferred"].as_u64() > Some(1000);
        begun.then_some(answer)
    });
    answers.push(active);
    source.set_parameters(json!({"max-bandwidth": 0}));
    answers.push(source.wait_completed(Deadline::seconds(30)));
    destination.wait_completed(Deadline::seconds(10));
    answers.push(destination.query_migrate());
    answers
}

#[test]
fn every_field_of_qemus_answer_is_ours_or_said_not_to_apply() {
    if !peers_present() {
        return;
    }
    let (ours, not_ours) = (ours(), documented("not ours"));
    let sets = [&["xbzrle", "auto-converge"][..], &["multifd"], &["postcopy-ram", "postcopy-blocktime"]];
    let versions = [Version::Qemu100, Version::Newest];
    for (version, capabilities) in versions.into_iter().flat_map(|version| sets.map(|set| (version, set))) {
        let dir = scratch();
        let answers = answers_of_qemu(version, dir.path(), capabilities);
        for (path, value) in answers.iter().flat_map(leaves) {
            let top = path.split('.').next().unwrap();
            if not_ours.contains(&top) {
                continue;
            }
            let same = ours.get(&path).unwrap_or_else(|| panic!("{version} has {path}: {value}"));
            assert_eq!(kind(same), kind(value), "{path}: ours {same}, QEMU's {value}");
        }
        let active = leaves(&answers[2]);
        assert!(active.contains_key("ram.pages-per-second") && active.contains_key("expected-downtime"));
        assert!(leaves(&answers[3]).contains_key("downtime"));
    }
}

/// Sends a file of memory to a `ramwire receive`; returns both reports.
fn known_migration(ram: &Path, dir: &Path, options: &[&str]) -> (Value, Value) {
    let listen: Vec<&str> =
        options.iter().copied().filter(|option| option.starts_with("--channels")).collect();
    let receive = ["receive", "tcp:127.0.0.1:0", "--json"];
    let into = format!("--dir={}", dir.join("guest").display());
    let mut receiver = Ramwire::start(dir, &[&receive[..], &listen].concat(), into);
    let uri = receiver.listening();
    let from = format!("--ram=m0={}", ram.display());
    let mut sender = Ramwire::start(dir, &[&["send", &uri, "--json"][..], options].concat(), from);
    let sent = sender.finished(Deadline::seconds(60), 0);
    (sent, receiver.finished(Deadline::seconds(20), 0))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no integer"))
}

/// Of all rounds together.
fn sum(out: &Value, of: impl Fn(&Value) -> u64) -> u64 {
    out["rounds"].as_array().unwrap().iter().map(of).sum()
}

/// Whole and zero pages of a file.
fn pages_of(file: &Path) -> (u64, u64) {
    let bytes = std::fs::read(file).unwrap();
    let zero = bytes.chunks(4096).filter(|page| page.iter().all(|byte| *byte == 0)).count() as u64;
    ((bytes.len() / 4096) as u64 - zero, zero)
}

#[test]
fn the_numbers_are_those_of_a_known_migration() {
    let dir = scratch();
    let ram = dir.path().join("ram");
    fill(&ram, 24, Pattern::Mixed { seed: 5 });
    let (whole, zero) = pages_of(&ram);
    for options in [&[][..], &["--channels=2"], &["--zero-page=none"], &["--max-bandwidth=40M"]] {
        let dir = scratch();
        let (sent, received) = known_migration(&ram, dir.path(), options);
        let ram = &sent["ram"];
        let what = format!("{options:?}: {sent} {received}");
        let (normal, duplicate) =
            if options == ["--zero-page=none"] { (whole + zero, 0) } else { (whole, zero) };
        assert_eq!((number(&ram["normal"]), number(&ram["duplicate"])), (normal, duplicate), "{what}");
        assert_eq!(number(&ram["normal-bytes"]), normal * 4096, "{what}");
        assert_eq!(sum(&sent, |round| number(&round["pages"]["normal"])), normal, "{what}");
        assert_eq!(sum(&sent, |round| number(&round["pages"]["zero"])), duplicate, "{what}");
        assert_eq!(sum(&sent, |round| number(&round["dirty_pages"])), whole + zero, "{what}");
        assert_eq!((number(&ram["total"]), number(&ram["remaining"])), (24 * MIB as u64, 0), "{what}");
        assert_eq!((number(&ram["page-size"]), number(&ram["dirty-pages-rate"])), (4096, 0), "{what}");
        // Before the first round, before the pause and after it.
        assert_eq!(number(&ram["dirty-sync-count"]), 3, "{what}");
        let (transferred, channel_bytes) = (number(&ram["transferred"]), number(&ram["multifd-bytes"]));
        assert_eq!(transferred, number(&received["bytes_received"]), "{what}");
        assert_eq!(channel_bytes > 0, options == ["--channels=2"], "{what}");
        let in_stream = number(&ram["precopy-bytes"]) + number(&ram["downtime-bytes"]);
        let on_channels = sum(&sent, |round| number(&round["bytes"])) - in_stream;
        let greetings = channel_bytes.checked_sub(on_channels).unwrap_or_else(|| panic!("{what}"));
        assert!(greetings < 8192 && (greetings > 0) == (channel_bytes > 0), "{greetings} bytes: {what}");
        let around = transferred - channel_bytes - in_stream;
        assert!(around > 0 && around < 4096, "{around} bytes of greeting and end: {what}");
        assert!(number(&ram["downtime-bytes"]) < 64, "nothing is left for the last round: {what}");
        assert_eq!(
            (&received["pages"]["normal"], &received["pages"]["zero"]),
            (&ram["normal"], &ram["duplicate"])
        );
        assert!(ram["mbps"].as_f64() > Some(0.0) && number(&ram["pages-per-second"]) > 0, "{what}");
        let parts = sent["downtime-parts"].as_object().unwrap();
        let parts: f64 = parts.values().map(|part| part.as_f64().unwrap()).sum();
        assert_eq!(number(&sent["downtime"]), parts as u64, "{what}");
        assert!(number(&sent["setup-time"]) <= number(&sent["total-time"]), "{what}");
    }
}

#[test]
fn a_peer_that_is_not_there_leaves_its_reason() {
    let dir = scratch();
    let ram = dir.path().join("ram");
    fill(&ram, 64, Pattern::Random { seed: 6 });
    let receive = ["receive", "tcp:127.0.0.1:0", "--max-ram=1M"];
    let mut receiver =
        Ramwire::start(dir.path(), &receive, format!("--dir={}", dir.path().join("guest").display()));
    let uri = receiver.listening();
    let from = format!("--ram=m0={}", ram.display());
    let mut sender = Ramwire::start(dir.path(), &["send", &uri, "--json"], from);
    let sent = sender.finished(Deadline::after(Duration::from_secs(30)), 3);
    assert_eq!(sent["status"], "failed", "{sent}");
    assert!(sent["error-desc"].as_str().is_some_and(|why| !why.is_empty()), "{sent}");
    // It is not known before a rate is.
    assert!(sent.get("downtime").is_none() && sent.get("expected-downtime").is_none(), "{sent}");
    receiver.failed(Deadline::seconds(10), 3);
}
