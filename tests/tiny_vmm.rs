//! docs/examples/tiny-vmm moves its KVM guest back and forth, and the guest's own check never fails.
#![cfg(all(feature = "cli", feature = "kvm", feature = "vm-memory"))]
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output};

/// The example's program; `cargo test` builds it next to the tests.
fn run(arguments: &[&str]) -> Output {
    let deps = std::env::current_exe().unwrap();
    let program = deps.ancestors().nth(2).unwrap().join("examples/tiny-vmm");
    assert!(program.exists(), "{} is missing: cargo build --example tiny-vmm", program.display());
    // Ends a migration that never ends: ten times the duration of the longest.
    Command::new("timeout").arg("600").arg(program).args(arguments).output().unwrap()
}

/// Why it did not start.
fn refused(arguments: &[&str]) -> String {
    let out = run(arguments);
    assert!(!out.status.success(), "{arguments:?} has begun");
    String::from_utf8_lossy(&out.stderr).into_owned()
}

fn tiny_vmm(arguments: &[&str]) -> String {
    let out = run(arguments);
    let (text, errors) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{arguments:?}:\n{text}\n{errors}");
    text
}

fn twenty_times(log: &str, vcpus: &str) -> String {
    tiny_vmm(&["--memory", "12M", "--rate", "30M", "--migrations", "20", "--log", log, "--vcpus", vcpus])
}

/// Every migration is reported with all pages verified, none wrong; and after each the guest has continued to write.
fn assert_twenty_whole_arrivals(text: &str) {
    for number in 1..=20 {
        let line = text.lines().find(|line| line.starts_with(&format!("{number}: "))).unwrap_or(text);
        assert!(
            line.contains(" 3072 pages verified, 0 wrong;") && !line.ends_with("; 0 written since"),
            "{line}"
        );
    }
    assert!(text.lines().last().unwrap().ends_with("nothing lost"), "{text}");
}

#[test]
fn twenty_migrations_by_the_dirty_log_lose_nothing() {
    assert_twenty_whole_arrivals(&twenty_times("log", "2"));
}

#[test]
fn twenty_migrations_by_dirty_rings_lose_nothing() {
    assert_twenty_whole_arrivals(&twenty_times("ring", "3"));
}

/// Its process is killed at twenty moments: each time its standby runs on from a whole checkpoint, and from none that is
/// older than what was let out.
#[test]
fn a_standby_runs_on_wherever_the_process_of_the_guest_is_killed() {
    let text = tiny_vmm(&["--protect", "5", "--memory", "12M", "--rate", "30M", "--migrations", "20"]);
    let went_on = text.lines().filter(|line| line.contains(" 3072 pages verified, 0 wrong;")).count();
    let before = text.lines().filter(|line| line.ends_with("before the first checkpoint")).count();
    assert!(went_on > 0 && went_on + before == 20, "{text}");
    assert!(text.ends_with("20 kills, nothing contradicted\n"), "{text}");
}

/// Nobody says that the process is dead: its lease runs out. Each second time it was only stopped, and when it continues
/// its vCPUs write nothing any more.
#[test]
fn a_standby_runs_on_by_itself_and_a_process_that_was_stopped_does_not() {
    let arguments = "--protect 5 --lease 3000 --memory 12M --rate 30M --migrations 4";
    let text = tiny_vmm(&arguments.split(' ').collect::<Vec<_>>());
    for number in 1..=4 {
        let ended = if number % 2 == 0 { "stopped" } else { "killed" };
        let line =
            text.lines().find(|line| line.starts_with(&format!("{number}: {ended} "))).unwrap_or(&text);
        assert!(line.contains(" 3072 pages verified, 0 wrong;"), "{text}");
    }
    assert!(text.ends_with("4 kills, nothing contradicted\n"), "{text}");
}

/// The figures of a migration that switched to postcopy: pages written while pages followed, faults of the vCPUs.
fn while_pages_followed(text: &str, number: u32) -> (u64, u64) {
    let line = text.lines().find(|line| line.starts_with(&format!("{number}: "))).unwrap_or(text);
    assert!(line.contains("; 3072 pages verified, 0 wrong;"), "{text}");
    let before = |word: &str| {
        let (before, _) = line.split_once(word).unwrap_or_else(|| panic!("no switch to postcopy: {text}"));
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    (before(" written while pages followed"), before(" faults "))
}

/// No page is sent before the switch, and the background would take 3 s for the pages that the vCPUs request
/// immediately: each waits in KVM_RUN for the pages of its lane, and a page that arrived wrong or twice would stop it.
#[test]
fn vcpus_run_before_their_memory_has_come_and_wait_where_it_is_missing() {
    for (log, vcpus) in [("log", "2"), ("ring", "3")] {
        let arguments = "--memory 12M --rate 0 --migrations 2 --postcopy 0 --max-bandwidth 4M";
        let mut arguments: Vec<_> = arguments.split(' ').collect();
        arguments.extend(["--log", log, "--vcpus", vcpus]);
        let text = tiny_vmm(&arguments);
        for number in 1..=2 {
            let (wrote, faults) = while_pages_followed(&text, number);
            assert!(wrote > 0 && faults > 0, "{log}: {text}");
        }
        assert!(text.contains("2 migrations in ") && text.contains("nothing lost"), "{text}");
    }
}

/// The first round sends all pages, and pages written meanwhile are missing at the switch: the older pages that are
/// already present must not be read. Nothing fits a downtime of 0, so each migration switches.
#[test]
fn what_was_written_in_the_first_round_is_missing_at_the_switch() {
    for log in ["log", "ring"] {
        let arguments = "--memory 12M --rate 0 --migrations 2 --postcopy --max-bandwidth 24M --downtime-ms 0";
        let mut arguments: Vec<_> = arguments.split(' ').collect();
        arguments.extend(["--log", log]);
        let text = tiny_vmm(&arguments);
        for number in 1..=2 {
            while_pages_followed(&text, number);
        }
        assert!(text.contains("2 migrations in ") && text.contains("nothing lost"), "{text}");
    }
}

/// A guest that writes its memory repeatedly and faster than the limit allows to send: it arrives intact, and its vCPUs
/// were throttled by at most this much, as the throttle reports it.
fn throttled(log: &str, kind: &str, guest: &str) -> u32 {
    let arguments = format!("{guest} --migrations 1 --log {log} --throttle {kind} --vcpu-dirty-limit 1M");
    let text = tiny_vmm(&arguments.split(' ').collect::<Vec<_>>());
    assert!(text.contains(" pages verified, 0 wrong;") && text.contains("nothing lost"), "{text}");
    let (before, _) = text.split_once(" %").unwrap_or_else(|| panic!("{text}"));
    before.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn auto_converge_takes_time_from_every_vcpu_and_brings_it_home() {
    for log in ["log", "ring"] {
        // It writes five times the limit without a pause.
        let guest = "--memory 16M --vcpus 2 --rate 32M --max-bandwidth 12M --downtime-ms 200";
        let taken = throttled(log, "auto-converge", guest);
        assert!((20..=99).contains(&taken), "{log}: {taken}");
    }
}

/// A vCPU within 25 MiB/s of its quota would not be throttled, and a ring reports a page once between two syncs: so
/// this much has to be written in a round. It would never arrive without rests; only on a busy machine, where it writes
/// less than the link carries, it needs none.
#[test]
fn a_dirty_limit_lets_a_vcpu_rest_and_brings_it_home() {
    for log in ["log", "ring"] {
        let guest = "--memory 64M --vcpus 1 --rate 120M --max-bandwidth 48M";
        let rest = throttled(log, "dirty-limit", guest);
        assert!(rest == 0 || (10..=9900).contains(&rest), "{log}: {rest}");
    }
}

/// The vCPUs write all the time, and wait in KVM_RUN for pages that are not copied yet. By their registers in the file
/// each page of it must be of one moment; a VM made from it runs, and so does the guest itself, which is checked in the
/// end.
#[test]
fn twenty_snapshots_of_running_vcpus_hold_the_whole_guest_and_it_runs_on() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let file = dir.path().join("guest");
    for (log, vcpus) in [("log", "2"), ("ring", "3")] {
        let arguments = "--memory 12M --rate 30M --migrations 10";
        let mut arguments: Vec<_> = arguments.split(' ').collect();
        arguments.extend(["--log", log, "--vcpus", vcpus, "--snapshot", file.to_str().unwrap()]);
        let text = tiny_vmm(&arguments);
        for number in 1..=10 {
            let line = text.lines().find(|line| line.starts_with(&format!("{number}: "))).unwrap_or(&text);
            assert!(
                line.contains(" 3072 pages verified, 0 wrong;") && !line.ends_with("; 0 written since"),
                "{line}"
            );
        }
        assert!(text.contains("10 snapshots in ") && text.contains("nothing lost"), "{text}");
    }
}

/// KVM's log stays on between two snapshots, and each holds what it reports since the one before. A VM is made of each chain,
/// and finds every page as its registers want it.
#[test]
fn snapshots_of_what_the_vcpus_have_changed_hold_the_whole_guest_with_their_bases() {
    for (log, vcpus) in [("log", "2"), ("ring", "3")] {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
        let file = dir.path().join("guest");
        let arguments = "--memory 12M --rate 3M --migrations 6 --incremental";
        let mut arguments: Vec<_> = arguments.split(' ').collect();
        arguments.extend(["--log", log, "--vcpus", vcpus, "--snapshot", file.to_str().unwrap()]);
        let text = tiny_vmm(&arguments);
        for number in 1..=4 {
            let line = text.lines().find(|line| line.starts_with(&format!("{number}: "))).unwrap_or(&text);
            assert!(line.contains(" 3072 pages verified, 0 wrong;"), "{line}");
        }
        assert!(text.contains("6 snapshots in ") && text.contains("nothing lost"), "{text}");
        // The first names no base: without it the others are refused.
        std::fs::remove_file(dir.path().join("guest.1")).unwrap();
        let arguments = ["--memory", "12M", "--log", log, "--restore"];
        let last = dir.path().join("guest.6").display().to_string();
        let error = refused(&[&arguments[..], &[&last]].concat());
        assert!(error.contains("NoBase") && error.contains("guest.1"), "{error}");
    }
}

/// Memory is read before or while the guest runs: the vCPUs continue where they were saved, and check every page before
/// they write it.
#[test]
fn a_guest_is_started_from_its_file_at_once_or_when_it_is_read() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let file = dir.path().join("guest");
    let file = file.to_str().unwrap();
    for log in ["log", "ring"] {
        let of =
            |more: &[&str]| tiny_vmm(&[&["--memory", "12M", "--rate", "0", "--log", log], more].concat());
        of(&["--migrations", "1", "--snapshot", file]);
        for way in [&["--restore", file][..], &["--restore", file, "--lazy"]] {
            let text = of(way);
            assert!(text.contains("; 3072 pages verified, 0 wrong;"), "{text}");
            assert_eq!(text.contains(" pages missing then"), way.contains(&"--lazy"), "{text}");
        }
    }
}
