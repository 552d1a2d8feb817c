//! Guests that write faster than the link: with throttling they arrive, without it the command reports it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use common::{Deadline, ramwire::Ramwire, scratch};
use serde_json::Value;

/// 16 MiB are written repeatedly, over a link of 8 MiB/s; they fit the downtime in no round, even if a busy machine
/// leaves the writers a quarter of their rate.
const GUEST: [&str; 3] = ["--ram=32M", "--working-set=16M", "--zero=50"];
const WAY: [&str; 6] =
    ["demo", "--json", "--transport=tcp", "--no-digest", "--downtime-ms=200", "--writers=2"];
const LINK: &str = "--max-bandwidth=8M";

fn demo(arguments: &[&str], status: i32) -> (Value, String) {
    demo_of(&[&WAY[..], &GUEST, arguments].concat(), status)
}

fn demo_of(arguments: &[&str], status: i32) -> (Value, String) {
    let dir = scratch();
    let mut run = Ramwire::start(dir.path(), arguments, "--populate");
    let out = run.finished(Deadline::seconds(120), status);
    println!(
        "{arguments:?}: {} ms, {} ms of downtime, {} rounds",
        out["total_ms"], out["downtime_ms"], out["rounds"]
    );
    (out, run.errors())
}

fn arrives(arguments: &[&str]) -> Value {
    let (out, _) = demo(arguments, 0);
    assert_eq!((&out["status"], &out["verified"]), (&"completed".into(), &true.into()), "{out}");
    out
}

#[test]
fn without_help_it_says_so_and_the_guest_stays() {
    let (out, errors) = demo(&[LINK, "--dirty-rate=72M", "--timeout=4"], 3);
    assert_eq!((&out["status"], &out["verified"]), (&"failed".into(), &false.into()), "{out}");
    assert!(errors.contains("did not converge within 4 s") && errors.contains("--auto-converge"), "{errors}");
}

#[test]
fn without_help_it_may_be_made_to_finish() {
    let out = arrives(&[LINK, "--dirty-rate=72M", "--timeout=3", "--timeout-action=finish"]);
    let last = out["round_log"].as_array().unwrap().last().unwrap();
    assert!(last["dirty_pages"].as_u64() > Some(0) && out["total_ms"].as_f64() >= Some(3000.0), "{out}");
}

#[test]
fn differences_bring_it_home() {
    let out = arrives(&[LINK, "--dirty-rate=72M", "--write-size=64", "--xbzrle-cache-size=64M"]);
    assert!(out["deltas"]["pages"].as_u64() > Some(0), "{out}");
    assert_eq!(out["throttle_percent_most"], 0);
}

/// Without options a demo ends nevertheless: it reports the problem and throttles its guest.
#[test]
fn a_demo_helps_itself_over_a_slow_link() {
    let (out, errors) = demo(&[LINK, "--dirty-rate=72M"], 0);
    assert_eq!((&out["status"], &out["verified"]), (&"completed".into(), &true.into()), "{out} {errors}");
    assert!(out["throttle_percent_most"].as_u64() >= Some(50), "{out}");
}

#[test]
fn auto_converge_brings_it_home() {
    let steps = ["--cpu-throttle-initial=60", "--cpu-throttle-increment=30"];
    let out = arrives(&[&[LINK, "--dirty-rate=72M", "--auto-converge"], &steps[..]].concat());
    assert!(out["throttle_percent_most"].as_u64() >= Some(60), "{out}");
}

#[test]
fn a_dirty_limit_brings_it_home() {
    // Within 25 MiB/s of its quota a vCPU is not throttled, and a page that is written twice in a round counts once:
    // the link carries several times as much, so that a slow machine's writers are throttled too.
    let fast = ["--ram=96M", "--working-set=64M", "--dirty-rate=800M", "--max-bandwidth=160M"];
    let (out, _) = demo_of(&[&WAY[..], &fast, &["--dirty-limit", "--vcpu-dirty-limit=1M"]].concat(), 0);
    assert_eq!((&out["status"], &out["verified"]), (&"completed".into(), &true.into()), "{out}");
    assert!(out["vcpu_rest_percent"].as_u64() > Some(0), "{out}");
}

#[test]
fn both_ways_to_throttle_at_once_are_refused() {
    let dir = scratch();
    let said = Ramwire::start(dir.path(), &["demo", "--auto-converge"], "--dirty-limit")
        .failed(Deadline::seconds(10), 2);
    assert!(said.contains("--dirty-limit"), "{said}");
}
