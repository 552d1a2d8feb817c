//! `--run-log`, `ramwire report` and `--metrics`: real runs, their logs compared with the docs, their pages in a
//! browser.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::memory::{Pattern, fill};
use common::{Deadline, ramwire::Ramwire, scratch, skip};
use serde_json::Value;

/// A busy guest of several rounds.
const BUSY: [&str; 11] = [
    "demo",
    "--json",
    "--ram=48M",
    "--working-set=16M",
    "--dirty-rate=20M",
    "--max-bandwidth=60M",
    "--downtime-ms=40",
    "--transport=unix",
    "--xbzrle-cache-size=8M",
    "--timeout=15",
    "--timeout-action=finish",
];

/// Runs the demo with a log in `dir`; returns its lines.
fn logged(dir: &Path) -> Vec<Value> {
    let log = format!("--run-log={}", dir.join("run.jsonl").display());
    let out = Ramwire::start(dir, &BUSY, log).finished(Deadline::seconds(60), 0);
    let text = fs::read_to_string(dir.join("run.jsonl")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of_kind = |kind: &str| lines.iter().filter(|line| line["kind"] == kind).count();
    assert_eq!(of_kind("round") as u64, out["rounds"].as_u64().unwrap(), "{text}");
    assert!(of_kind("sample") >= 3, "the first round alone takes 600 ms: {text}");
    let end = lines.last().unwrap();
    assert_eq!((&end["status"], &end["transferred"]), (&out["status"], &out["bytes_sent"]));
    assert_eq!(
        (&end["downtime_parts"], &end["batch_latency"]),
        (&out["downtime_parts"], &out["batch_latency"])
    );
    lines
}

fn report(dir: &Path, log: &Path, status: i32) -> (String, String) {
    let page = dir.join("report.html");
    let _ = fs::remove_file(&page);
    let output = format!("--output={}", page.display());
    let mut run = Ramwire::start(dir, &["report", &log.display().to_string()], output);
    let (found, said) = run.ended(Deadline::seconds(20));
    assert_eq!(found, status, "{said}");
    (fs::read_to_string(page).unwrap_or_default(), said)
}

#[test]
fn the_log_has_the_documented_fields_and_its_report_stands_in_a_browser() {
    let dir = scratch();
    let lines = logged(dir.path());
    let mut documented = BTreeMap::new();
    let rows = include_str!("../docs/run-log.md").lines().filter(|line| line.starts_with("| `"));
    for row in rows {
        let cells: Vec<&str> = row.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
        documented.insert((cells[1], cells[2]), cells[3]);
    }
    let mut found = BTreeSet::new();
    for line in &lines {
        let kind = line["kind"].as_str().unwrap();
        for (field, value) in line.as_object().unwrap().iter().filter(|(field, _)| *field != "kind") {
            let named = documented.keys().find(|key| **key == (kind, field.as_str()));
            let named = named.unwrap_or_else(|| panic!("{kind}.{field} is not in docs/run-log.md"));
            let fits = match documented[named] {
                "string" => value.is_string(),
                "string or null" => value.is_string() || value.is_null(),
                "integer" => value.is_u64(),
                "number" => value.is_number(),
                "number or null" => value.is_number() || value.is_null(),
                "boolean" => value.is_boolean(),
                "object" => value.is_object(),
                other => panic!("unknown type {other}"),
            };
            assert!(fits, "{kind}.{field} is no {}: {value}", documented[named]);
            found.insert(*named);
        }
    }
    assert_eq!(found.len(), documented.len(), "some fields were never seen: {found:?}");

    let (page, _) = report(dir.path(), &dir.path().join("run.jsonl"), 0);
    for needed in [
        "completed",
        "Remaining",
        "Rate and dirty rate",
        "Throttle",
        "Pages by kind",
        "Downtime by parts",
        "Latency",
    ] {
        assert!(page.contains(needed), "{needed} is missing");
    }
    assert_eq!(page.matches("<svg").count(), 12, "six pictures in two sizes");
    assert!(
        !page.contains("<script") && !page.contains(" src=") && !page.contains("url("),
        "nothing from elsewhere"
    );
    let links = page.matches("http").count() - page.matches("http-equiv").count();
    assert_eq!(links, page.matches("xmlns=\"http://www.w3.org/2000/svg\"").count(), "no other address");
    in_a_browser(dir.path());
}

/// The page's size in a browser window of this width: nothing is wider than the window.
fn in_a_browser(dir: &Path) {
    if !Command::new("chromium").arg("--version").output().is_ok_and(|output| output.status.success()) {
        skip("there is no chromium to look at a report with; run ci/setup");
        return;
    }
    // A browser window has a minimum width; a frame has none. Scripts of this page measure the report inside.
    let measure = r#"<!doctype html><body><script>
        let out = [];
        for (const width of [1280, 400]) {
            const frame = document.createElement("iframe");
            frame.src = "report.html"; frame.width = width; frame.height = 900;
            frame.onload = () => {
                const page = frame.contentDocument.documentElement;
                const shown = [...frame.contentDocument.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 0);
                out.push(`${width}:${page.scrollWidth <= page.clientWidth}:${shown.length}`);
                document.title = out.sort().join(" ");
                document.body.textContent = "MEASURED " + document.title;
            };
            document.body.append(frame);
        }
        </script></body>"#
        .replace("document.body.textContent = \"MEASURED \" + document.title", "document.body.dataset.found = document.title");
    fs::write(dir.join("measure.html"), measure).unwrap();
    let out = Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--timeout=5000",
        ])
        .args(["--virtual-time-budget=3000", "--dump-dom"])
        .arg(format!("--user-data-dir={}", dir.join("browser").display()))
        .arg(format!("file://{}", dir.join("measure.html").display()))
        .output()
        .unwrap();
    let dom = String::from_utf8_lossy(&out.stdout);
    let found = dom.split("data-found=\"").nth(1).and_then(|rest| rest.split('"').next());
    // Six charts are shown at either width, and none makes the page wider than its window.
    assert_eq!(found, Some("1280:true:6 400:true:6"), "{dom} {}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn a_log_that_was_cut_off_is_a_page_and_a_hostile_one_an_error_with_its_line() {
    let dir = scratch();
    let lines = logged(dir.path());
    let cut = dir.path().join("cut.jsonl");
    let text: Vec<String> = lines.iter().map(Value::to_string).collect();
    let half = text.len() / 2;
    fs::write(&cut, format!("{}\n{}", text[..half].join("\n"), &text[half][..30])).unwrap();
    let (page, _) = report(dir.path(), &cut, 0);
    assert!(page.contains("cut off") && page.contains("in the middle of the migration"), "{page}");
    assert!(page.contains("last line is not whole"));

    fs::write(&cut, &text[0]).unwrap();
    let (page, _) = report(dir.path(), &cut, 0);
    assert!(page.contains("cut off"), "a log that had only begun");

    let evil = "</style><script>alert(1)</script>\"'&";
    let mut first = lines[0].clone();
    for field in ["command", "transport", "why", "ramwire"] {
        first[field] = evil.into();
    }
    first["settings"] = serde_json::json!({ evil: { evil: [evil] } });
    let event = serde_json::json!({"kind": "event", "at_ms": 1.0, "event": evil, "why": evil});
    fs::write(&cut, format!("{first}\n{event}\n")).unwrap();
    let (page, _) = report(dir.path(), &cut, 0);
    assert!(!page.contains("<script") && page.contains("&lt;script&gt;"), "{page}");

    for (line, broken) in
        [(1, "{}".to_owned()), (half + 1, text[half][..20].to_owned()), (half + 1, "\u{0}".into())]
    {
        let mut text = text.clone();
        text[line - 1] = broken;
        fs::write(&cut, text.join("\n")).unwrap();
        let (page, said) = report(dir.path(), &cut, 3);
        assert!(said.contains(&format!("cut.jsonl: line {line}: ")) && page.is_empty(), "{said}");
    }
    let big = lines[0].to_string()
        + "\n"
        + r#"{"kind":"sample","at_ms":1,"status":"active","round":4294967295,"remaining":18446744073709551615,"transferred":18446744073709551615,"throughput":18446744073709551615,"dirty_pages_rate":18446744073709551615,"throttle_percent":255,"expected_downtime_ms":1e12,"eta_ms":null,"pages":{"normal":18446744073709551615,"zero":0,"delta":0}}"#;
    fs::write(&cut, big).unwrap();
    assert!(report(dir.path(), &cut, 0).0.contains("cut off"), "the largest numbers are drawn too");
}

#[test]
fn a_log_that_cannot_be_written_is_told_before_anything_happens_or_after_all_went_well() {
    let dir = scratch();
    let demo = ["demo", "--json", "--ram=8M", "--working-set=1M", "--dirty-rate=0", "--transport=unix"];
    let missing = format!("--run-log={}", dir.path().join("missing/run.jsonl").display());
    let said = Ramwire::start(dir.path(), &demo, missing).failed(Deadline::seconds(20), 3);
    assert!(said.contains("--run-log") && said.contains("No such file"), "{said}");
    let mut run = Ramwire::start(dir.path(), &demo, "--run-log=/dev/full");
    assert_eq!(run.finished(Deadline::seconds(30), 0)["verified"], true, "a full disk disturbs no migration");
    assert!(run.errors().contains("the log is not whole"), "{}", run.errors());
}

/// The text that a Prometheus server reads: every sample belongs to a family that was described before it.
fn assert_open_metrics(text: &str) -> BTreeMap<String, f64> {
    let (mut families, mut samples) = (BTreeMap::new(), BTreeMap::new());
    let body = text.strip_suffix("# EOF\n").expect("the end mark");
    for line in body.lines() {
        if let Some(family) = line.strip_prefix("# TYPE ") {
            let (name, kind) = family.split_once(' ').unwrap();
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            assert!(families.insert(name.to_owned(), kind.to_owned()).is_none(), "{name} twice");
        } else if let Some(unit) = line.strip_prefix("# UNIT ") {
            let (name, unit) = unit.split_once(' ').unwrap();
            assert!(name.ends_with(&format!("_{unit}")), "{line}");
        } else if !line.starts_with("# HELP ") {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let bare = name.split('{').next().unwrap();
            let family = bare.strip_suffix("_total").unwrap_or(bare);
            let kind = families.get(family).unwrap_or_else(|| panic!("{line}: no TYPE before"));
            assert_eq!(kind == "counter", bare.ends_with("_total"), "{line}");
            if let Some(labels) = name.strip_prefix(bare).filter(|labels| !labels.is_empty()) {
                assert!(
                    labels.starts_with('{') && labels.ends_with("\"}") && labels.contains("=\""),
                    "{line}"
                );
            }
            assert!(samples.insert(name.to_owned(), value.parse().unwrap()).is_none(), "{line} twice");
        }
    }
    let documented: BTreeSet<_> = include_str!("../docs/statistics.md")
        .lines()
        .filter_map(|line| line.strip_prefix("| `ramwire_")?.split('`').next())
        .map(|name| format!("ramwire_{name}"))
        .collect();
    assert_eq!(families.into_keys().collect::<BTreeSet<_>>(), documented);
    samples
}

fn curl(arguments: &[&str], url: &str) -> Option<String> {
    let out =
        Command::new("curl").args(["--silent", "--max-time", "5"]).args(arguments).arg(url).output().ok()?;
    out.status.success().then(|| String::from_utf8(out.stdout).unwrap())
}

#[test]
fn curl_reads_the_metrics_of_a_running_migration_and_bad_clients_disturb_nothing() {
    let dir = scratch();
    let slow = [
        "demo",
        "--json",
        "--ram=96M",
        "--working-set=1M",
        "--dirty-rate=1M",
        // Fourteen seconds, in which all following requests are made.
        "--max-bandwidth=5M",
        "--transport=unix",
    ];
    let mut run = Ramwire::start(dir.path(), &slow, "--metrics=0");
    let errors = || String::new();
    let url = Deadline::seconds(20).poll("the address of the metrics", errors, || {
        let said = run.errors();
        said.contains("/metrics\n").then(|| said.split("metrics at ").nth(1).unwrap().trim().to_owned())
    });
    let samples = Deadline::seconds(20).poll("some bytes", String::new, || {
        let samples = assert_open_metrics(&curl(&[], &url)?);
        (samples["ramwire_transferred_bytes_total"] > 1e6).then_some(samples)
    });
    assert_eq!(samples["ramwire_status{status=\"active\"}"], 1.0, "{samples:?}");
    assert_eq!(samples["ramwire_ram_bytes"], 96.0 * 1024.0 * 1024.0);
    let headers = curl(&["--head"], &url).unwrap();
    assert!(
        headers.starts_with("HTTP/1.1 200 OK") && headers.contains("application/openmetrics-text"),
        "{headers}"
    );
    let status = ["--output", "/dev/null", "--write-out", "%{http_code}"];
    assert_eq!(curl(&[&status[..], &["--data", "x"]].concat(), &url).unwrap(), "405");
    assert_eq!(curl(&status, &url.replace("/metrics", "/other")).unwrap(), "404");

    let place = url.trim_start_matches("http://").trim_end_matches("/metrics");
    let client = |bytes: &[u8]| {
        let mut client = TcpStream::connect(place).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        // It may have closed already.
        let _ = client.write_all(bytes);
        let mut answer = Vec::new();
        let _ = client.read_to_end(&mut answer);
        String::from_utf8_lossy(&answer).into_owned()
    };
    assert!(client(b"\x00\xff\x16garbage\r\n\r\n").starts_with("HTTP/1.1 400"));
    client(&[b'x'; 100_000]);
    // A silent client is dropped after two seconds, and the next is served.
    assert_eq!(client(b"GET /metrics HT"), "");
    assert_open_metrics(&curl(&[], &url).unwrap());
    let out = run.finished(Deadline::seconds(60), 0);
    assert_eq!(out["verified"], true, "{out}");
}

/// The address of a command's metrics, as it reports it.
fn metrics_of(run: &Ramwire) -> String {
    Deadline::seconds(20).poll("the address of the metrics", String::new, || {
        let said = run.errors();
        let line = said.lines().find_map(|line| line.split("metrics at ").nth(1))?.trim().to_owned();
        said.contains(&format!("{line}\n")).then_some(line)
    })
}

/// One guest is sent through all three, each queried while pages are sent.
#[test]
fn sender_relay_and_receiver_tell_their_figures_while_a_guest_passes() {
    const RAM: usize = 48 << 20;
    let dir = scratch();
    let ram = dir.path().join("ram");
    fill(&ram, RAM >> 20, Pattern::Random { seed: 4 });
    let receive = ["receive", "tcp:127.0.0.1:0", "--json", "--metrics=0", "--dir"];
    let mut receiver = Ramwire::start(dir.path(), &receive, dir.path().join("guest"));
    let relay = ["relay", "--json", "--metrics=0", "--listen=tcp:127.0.0.1:0", "--connect"];
    let mut relay = Ramwire::start(dir.path(), &relay, receiver.listening());
    let block = format!("--ram=m0={}", ram.display());
    let send = ["send", &relay.listening(), "--json", "--metrics=0", "--max-bandwidth=4M", &block];
    let mut sender = Ramwire::start(dir.path(), &send, "--peer=ramwire");

    let has_passed = |samples: &BTreeMap<String, f64>| samples["ramwire_transferred_bytes_total"] > 1e6;
    let mut seen = Vec::new();
    for (name, run) in [("send", &sender), ("relay", &relay), ("receive", &receiver)] {
        let url = metrics_of(run);
        let samples = Deadline::seconds(20).poll(&format!("{name}: some bytes"), String::new, || {
            Some(assert_open_metrics(&curl(&[], &url)?)).filter(has_passed)
        });
        assert_eq!(samples["ramwire_status{status=\"active\"}"], 1.0, "{name}: {samples:?}");
        let pages = samples["ramwire_pages_total{kind=\"normal\"}"];
        assert!(pages > 100.0 && pages < (RAM / 4096) as f64, "{name}: {samples:?}");
        seen.push(samples);
    }
    for (name, samples) in ["send", "relay", "receive"].iter().zip(&seen) {
        assert_eq!(samples["ramwire_ram_bytes"], RAM as f64, "{name}");
        // A relay's remaining bytes are those that it has received and not sent on.
        let left = samples["ramwire_remaining_bytes"];
        assert!(*name == "relay" || (left > 0.0 && left < RAM as f64), "{name}: {samples:?}");
        assert!(samples["ramwire_total_seconds"] > 0.0, "{name}: {samples:?}");
        assert_eq!(samples["ramwire_skipped_pages_total{why=\"hint\"}"], 0.0, "{name}");
    }
    assert!(seen[2]["ramwire_throughput_bytes_per_second"] > 0.0, "{:?}", seen[2]);
    for run in [&mut sender, &mut relay] {
        run.finished(Deadline::seconds(60), 0);
    }
    let out = receiver.finished(Deadline::seconds(60), 0);
    assert_eq!(out["ram_bytes"], RAM, "{out}");
    assert!(out["throughput"].as_u64() > Some(0) && out["took_ms"].as_f64() > Some(0.0), "{out}");
}
