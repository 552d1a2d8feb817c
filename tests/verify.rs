//! `--verify` of the demo: a writing guest, by each way.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use serde_json::Value;

/// The demo's JSON, of a small writing guest.
fn demo(arguments: &[&str]) -> Value {
    let sizes = ["demo", "--ram", "32M", "--working-set", "8M", "--dirty-rate", "40M", "--json"];
    let out = Command::new(env!("CARGO_BIN_EXE_ramwire")).args(sizes).args(arguments).output().unwrap();
    let (text, errors) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert_eq!(out.status.code(), Some(0), "{text}{errors}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn a_writing_guest_is_compared_page_by_page_and_at_the_end() {
    for way in [&["--transport", "tcp"][..], &["--transport", "unix"], &["--channels", "2"]] {
        let out = demo(&[&["--verify", "fast"], way].concat());
        let (result, pages) = (&out["memory_check"]["result"], &out["memory_check"]["pages"]);
        assert_eq!((result.as_str(), pages.as_u64()), (Some("equal"), Some(8192)), "{way:?}: {out}");
        assert_eq!((&out["verified"], &out["digest_compared"]), (&true.into(), &true.into()), "{way:?}");
        assert_eq!(out["downtime_parts"]["digest_ms"].as_f64(), Some(0.0), "{way:?}");
    }
}

#[test]
fn without_fingerprints_nobody_looks_at_the_sources_memory() {
    for (how, compared) in
        [(&["--verify", "full"][..], true), (&["--verify", "off"], false), (&["--no-digest"], false)]
    {
        let out = demo(how);
        assert_eq!(out["memory_check"]["result"], "not asked", "{how:?}");
        assert_eq!(out["digest_compared"], compared, "{how:?}");
    }
}
