//! `ramwire demo --postcopy`, and connections that are cut.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::common::huge_pages::HugePages;
use crate::common::{Deadline, ramwire::Ramwire, scratch};
use crate::{BUSY, demo, pages, rounds};

/// The guest's threads need all its memory at once, and background pages would take minutes to arrive: they get it by
/// faults.
#[test]
fn a_guest_runs_there_before_its_memory_has_come() {
    for (transport, more) in
        [("tcp", &["--dirty-rate", "30M"][..]), ("unix", &["--dirty-rate", "0", "--thp"])]
    {
        let sizes = ["--ram", "16M", "--block", "12K", "--working-set", "2M", "--transport", transport];
        let out = demo(&[&["--postcopy", "--max-postcopy-bandwidth", "64K"], &sizes[..], more].concat());
        let came = &out["postcopy"];
        let all = Value::from(16 * 256 + 3);
        assert_eq!(
            (&came["switched"], &came["pages_read"], &out["pages_checked"]),
            (&true.into(), &all, &all)
        );
        let count = |value: &Value| value.as_u64().unwrap();
        // Before the limit of this test the link brings a quarter that is zero and half of the rest by itself.
        assert!(count(&came["faults"]) > 512 && count(&came["requests"]) > 512, "{came}");
        assert!(count(&came["bytes"]) > 8 << 20, "{came}");
        let latency = ["count", "p50_us", "p99_us", "max_us"].map(|name| count(&came["fault_latency"][name]));
        assert!(latency[0] > 512 && latency[1] > 0 && latency[1..].is_sorted(), "{came}");
        assert!(
            came["all_came_ms"].as_f64() > Some(0.0) && came["time_to_run_ms"].as_f64() > Some(0.0),
            "{came}"
        );
        assert_eq!((rounds(&out), &out["digest_compared"]), (0, &false.into()), "{out}");
        assert!(
            count(&out["throughput_bytes_per_s"]) > 0 && count(&out["batch_latency"]["count"]) > 0,
            "{out}"
        );
    }
}

/// The comparison that is the default yields to it.
#[test]
fn a_guest_that_does_not_converge_in_time_runs_there_before_its_memory_has_come() {
    let dir = scratch();
    let link = ["demo", "--transport", "tcp", "--max-bandwidth", "2M", "--ram", "16M", "--working-set", "2M"];
    let arguments = [&link[..], &["--timeout", "0.5", "--timeout-action", "postcopy"]].concat();
    let out = Ramwire::start(dir.path(), &arguments, "--json").finished(Deadline::seconds(100), 0);
    assert_eq!(
        (&out["postcopy"]["switched"], &out["digest_compared"]),
        (&true.into(), &false.into()),
        "{out}"
    );
}

/// The connection is cut while pages follow, each time before others are placed, however fast they come; all arrive whole.
#[test]
fn a_connection_that_is_cut_again_and_again_in_postcopy_loses_no_page() {
    for (transport, cuts) in [("tcp", 6), ("unix", 3)] {
        let sizes = ["--ram", "16M", "--block", "12K", "--working-set", "2M", "--dirty-rate", "30M"];
        let cut = ["--postcopy", "--transport", transport, "--cut", &cuts.to_string()];
        let out = demo(&[&cut[..], &sizes[..]].concat());
        let recoveries = out["postcopy"]["recoveries"].as_array().unwrap();
        let there: Vec<_> = recoveries.iter().map(|cut| cut["pages_there"].as_u64().unwrap()).collect();
        assert_eq!(there.len(), cuts, "{there:?}");
        let all = 16 * 256 + 3;
        assert!(there.is_sorted_by(|one, next| one < next) && there.last() < Some(&all), "{there:?}");
        assert!(recoveries.iter().all(|cut| cut["took_ms"].as_f64() > Some(0.0)), "{recoveries:?}");
        assert_eq!((&out["postcopy"]["pages_read"], &out["pages_checked"]), (&all.into(), &all.into()));
    }
    // A guest that is migrated without postcopy has no connection to lose afterwards.
    let idle = ["--postcopy", "--postcopy-after", "1", "--cut", "3", "--ram", "8M", "--working-set", "1M"];
    let out = demo(&[&idle[..], &["--dirty-rate", "0"]].concat());
    assert_eq!(out["postcopy"]["recoveries"], Value::Array(Vec::new()), "{out}");
}

/// The connection is cut while the guest runs at its source and its pages arrive; what has not been confirmed goes again, and
/// no more than that.
#[test]
fn a_connection_that_is_cut_again_and_again_in_precopy_loses_no_page() {
    for (transport, verify, cuts, channels) in [
        ("tcp", "full", 6, 0),
        ("unix", "fast", 3, 0),
        ("tcp", "off", 1, 0),
        ("tcp", "fast", 1, 2),
        ("tcp", "full", 4, 3),
        ("unix", "off", 2, 1),
    ] {
        let sizes = ["--ram", "16M", "--block", "12K", "--working-set", "2M", "--dirty-rate", "10M"];
        let cut = ["--transport", transport, "--verify", verify, "--cut", &cuts.to_string()];
        let channels = ["--channels", &channels.to_string()];
        let out = demo(&[&cut[..], &channels[..], &sizes[..]].concat());
        let (lost, all) = (&out["lost"], 16 * 256 + 3_u64);
        assert_eq!((&lost["count"], &out["pages_checked"]), (&cuts.into(), &all.into()), "{lost}");
        let last = lost["last"].as_array().unwrap();
        assert_eq!(last.len(), cuts, "{lost}");
        let again: u64 = last.iter().map(|lost| lost["pages_again"].as_u64().unwrap()).sum();
        assert_eq!(lost["pages_again"], again);
        assert_eq!(lost["bytes_again"], again * 4096);
        for lost in last {
            assert!(lost["took_ms"].as_f64() > Some(0.0) && lost["why"].as_str() != Some(""), "{lost}");
            // What the socket's buffers hold, and no second copy of all that had come.
            assert!(lost["pages_again"].as_u64().unwrap() < all, "{lost}");
        }
        assert_eq!((&out["verified"], &out["status"]), (&true.into(), &"completed".into()));
    }
}

/// The source's process has less of the guest in memory with each page that the destination proves to have, all cuts included.
#[test]
fn the_sources_memory_is_given_back_to_the_kernel() {
    const MIB: u64 = 1 << 20;
    for kind in [&["--thp"][..], &[]] {
        let sizes = ["--ram", "48M", "--zero", "0", "--working-set", "2M", "--dirty-rate", "30M"];
        let postcopy = ["--postcopy", "--transport", "tcp", "--cut", "2"];
        let out = demo(&[&postcopy[..], &sizes[..], kind, &["--release-ram"]].concat());
        let came = &out["postcopy"];
        let count = |name: &str| came[name].as_u64().unwrap();
        assert_eq!((&came["released_pages"], &out["pages_checked"]), (&pages(48), &pages(48)), "{came}");
        assert!(count("resident_before") > 48 * MIB, "{came}");
        assert!(count("resident_after") + 40 * MIB < count("resident_before"), "{came}");
        let out = demo(&[&postcopy[..], &sizes[..], kind].concat());
        let (before, after) = (&out["postcopy"]["resident_before"], &out["postcopy"]["resident_after"]);
        assert!(after.as_u64().unwrap() + 8 * MIB > before.as_u64().unwrap(), "kept: {out}");
    }
}

#[test]
fn a_switch_to_postcopy_comes_after_rounds_or_is_not_needed() {
    let after = ["--postcopy", "--postcopy-after", "1", "--transport", "tcp"];
    let out = demo(&[&after[..], &["--ram", "45M"], &BUSY[..]].concat());
    assert_eq!((rounds(&out), &out["postcopy"]["switched"]), (1, &true.into()), "{out}");
    let idle = ["--ram", "8M", "--working-set", "1M", "--dirty-rate", "0"];
    let out = demo(&[&after[..], &idle[..]].concat());
    assert_eq!(
        (&out["postcopy"]["switched"], &out["postcopy"]["pages_read"]),
        (&false.into(), &pages(8)),
        "{out}"
    );
}

#[test]
fn memory_of_huge_pages_follows_its_guest() {
    if let Some(_pages) = HugePages::reserve(2048, 64) {
        let huge = ["--postcopy", "--transport", "tcp", "--ram", "32M", "--hugetlb", "2M", "--block", "12K"];
        let out = demo(&[&huge[..], &["--working-set", "8M", "--dirty-rate", "30M"]].concat());
        assert_eq!(
            (&out["postcopy"]["switched"], &out["postcopy"]["pages_read"]),
            (&true.into(), &(32 * 256 + 3).into())
        );
    }
}

#[test]
fn a_switch_to_postcopy_that_can_not_be_is_refused_with_the_reason() {
    let dir = scratch();
    let refused = Ramwire::start(dir.path(), &["demo", "--ram", "8M", "--postcopy", "--guest"], "kvm")
        .failed(Deadline::seconds(20), 2);
    assert!(refused.contains("postcopy") && refused.contains("checks its memory"), "{refused}");
}

#[test]
fn page_channels_carry_pages_in_postcopy_too() {
    let dir = scratch();
    let arguments = ["demo", "--ram", "8M", "--transport", "tcp", "--postcopy", "--channels"];
    let (status, said) = Ramwire::start(dir.path(), &arguments, "2").ended(Deadline::seconds(60));
    assert_eq!(status, 0, "{said}");
}

/// Memory is missing at the destination for ten seconds at least; one of the two processes is killed meanwhile.
#[test]
fn an_end_that_is_killed_in_postcopy_leaves_no_process_and_is_told() {
    for kill_destination in [true, false] {
        let dir = scratch();
        let log = dir.path().join("run.jsonl");
        let arguments =
            ["demo", "--postcopy", "--transport", "tcp", "--link-rate", "1M", "--ram", "16M", "--run-log"];
        let mut demo = Ramwire::start(dir.path(), &arguments, &log);
        let read = || fs::read_to_string(&log).unwrap_or_default();
        let switched = || read().contains("postcopy-active").then_some(());
        Deadline::seconds(60).poll("the switch", read, switched);
        let children = format!("/proc/{0}/task/{0}/children", demo.pid());
        let destination = fs::read_to_string(children).unwrap().trim().to_owned();
        // A process that has ended and was not waited for yet has no command line.
        let alive = || fs::read(format!("/proc/{destination}/cmdline")).is_ok_and(|line| !line.is_empty());
        assert!(alive(), "one child: {destination}");
        if kill_destination {
            assert!(Command::new("kill").args(["-KILL", &destination]).status().unwrap().success());
            let (status, errors) = demo.ended(Deadline::seconds(60));
            assert!(status == 5 && errors.contains("memory was missing there"), "{status} {errors}");
        } else {
            drop(demo);
        }
        Deadline::seconds(60).poll("the destination's end", String::new, || (!alive()).then_some(()));
    }
}
