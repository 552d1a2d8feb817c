//! A whole migration whose threads may make only the system calls that docs/seccomp.json lists, with the ioctls that it
//! names; docs/embedding.md describes the purpose of each.
//!
//! A thread that makes another call ends its process by SIGSYS, so each migration runs in a process of its
//! own: this program again, with one ignored test and a scenario in the environment.
#![allow(clippy::unwrap_used)]
#![cfg(target_arch = "x86_64")]

mod files;
mod live;
mod machine;
mod snapshot;
mod urgent;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::Output;
use std::time::Duration;

use seccompiler::{TargetArch, compile_from_json};
use serde_json::Value;

/// How the child receives its task: `WAY END DIRTY-SOURCE FILTERS`. With the way `file` the end is `completed`.
const SCENARIO: &str = "RAMWIRE_SECCOMP_SCENARIO";
const PAGES: u64 = 24 << 8;
/// Longer than a wait lasts without a check of the connection.
const SLOW: Duration = Duration::from_millis(1500);
/// A quarter of it is shorter than [`SLOW`]: while the destination loads, it sends keepalives to the source.
const STALL: Duration = Duration::from_secs(5);

type Calls = BTreeMap<String, BTreeSet<String>>;

/// The calls of each thread, from the tables of docs/embedding.md: columns are threads, rows are calls.
fn documented() -> Calls {
    let mut calls = Calls::new();
    let mut threads: Vec<String> = Vec::new();
    for line in include_str!("../../docs/embedding.md").lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let code = |cell: &str| cell.strip_prefix('`')?.strip_suffix('`').map(str::to_owned);
        if cells[0] == "system call" {
            threads = cells[1..].iter().map_while(|cell| code(cell)).collect();
        } else if !line.starts_with('|') {
            threads.clear();
        } else if let Some(call) = code(cells[0]) {
            for (thread, cell) in threads.iter().zip(&cells[1..]) {
                assert!(matches!(*cell, "yes" | ""), "{line}");
                let of_thread = calls.entry(thread.clone()).or_default();
                assert!(cell.is_empty() || of_thread.insert(call.clone()), "{call} stands there twice");
            }
        }
    }
    calls
}

/// The filters of docs/seccomp.json, one for each thread. Any other call ends the process.
fn listed() -> Value {
    serde_json::from_str(include_str!("../../docs/seccomp.json")).unwrap()
}

/// The rules of a thread's filter.
fn rules<'a>(filters: &'a mut Value, thread: &str) -> &'a mut Vec<Value> {
    filters[thread]["filter"].as_array_mut().unwrap()
}

#[test]
fn the_filters_list_the_calls_of_the_tables() {
    let mut filters = listed();
    let threads: Vec<String> = filters.as_object().unwrap().keys().cloned().collect();
    let named = |rule: &Value| rule["syscall"].as_str().unwrap().to_owned();
    let calls: Calls = threads
        .into_iter()
        .map(|thread| {
            let calls = rules(&mut filters, &thread).iter().map(named).collect();
            (thread, calls)
        })
        .collect();
    assert_eq!(calls, documented());
}

/// The kernel keeps 15 characters of a name (pthread_setname_np(3)): two longer names with the same beginning look
/// equal in `top -H`.
#[test]
fn names_of_threads_fit_the_kernel_and_are_documented() {
    let table = include_str!("../../docs/embedding.md");
    let mut found = BTreeSet::new();
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/src"))];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            let is_cli = path.components().any(|part| part.as_os_str() == "cli");
            // A thread's name follows the call that starts it, on its line or the next.
            for call in ["spawn(", "name(", "map(", "map_watched(", ".spawn)(", "start("] {
                for (at, _) in text.match_indices(call) {
                    let rest = text[at + call.len()..].split_once("\"ramwire-");
                    let Some((between, rest)) = rest.filter(|(between, _)| between.len() < 60) else {
                        continue;
                    };
                    if between.contains([';', '{']) {
                        continue;
                    }
                    let name = format!("ramwire-{}", rest.split('"').next().unwrap());
                    assert!(name.len() <= 15, "{name} in {}", path.display());
                    assert!(
                        is_cli || table.contains(&format!("| `{name}` |")),
                        "{name} is not in docs/embedding.md"
                    );
                    found.insert(name);
                }
            }
        }
    }
    for name in ["ramwire-source", "ramwire-dest", "ramwire-chan-tx", "ramwire-faults", "ramwire-log"] {
        assert!(found.contains(name), "{name} was not found: {found:?}");
    }
}

#[test]
#[ignore = "a process of the other tests"]
fn child() {
    let scenario = std::env::var(SCENARIO).unwrap_or_else(|_| "unix completed software none".into());
    let words: Vec<&str> = scenario.split(' ').collect();
    let mut filters = listed();
    if let Some((thread, call)) = words[3].split_once('/') {
        let rules = rules(&mut filters, thread);
        let before = rules.len();
        // A call, or one of the kinds of ioctl.
        rules.retain(|rule| rule["syscall"] != call && rule["comment"] != call);
        assert!(rules.len() < before, "{} is not listed", words[3]);
    }
    let filters = serde_json::to_vec(&filters).unwrap();
    let filters = (words[3] != "none").then(|| compile_from_json(&*filters, TargetArch::x86_64).unwrap());
    match words[0] {
        "file" if words[1] == "lazy" => files::restore(filters),
        "file" => files::through_a_file(filters),
        "urgent" => urgent::urgent(filters),
        "snapshot" => snapshot::snapshots(filters),
        "serve" => snapshot::served(words[1], filters),
        way => live::migrate(way, words[1], words[2], filters),
    }
}

fn run(scenario: &str) -> Output {
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored", "--nocapture"]).env(SCENARIO, scenario);
    command.output().unwrap()
}

fn must_migrate(scenario: &str) {
    let output = run(scenario);
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    let sigsys = if output.status.signal() == Some(libc::SIGSYS) {
        "a call is missing in docs/seccomp.json; strace -f this program's `child` to see which"
    } else {
        ""
    };
    assert!(output.status.success(), "{scenario}: {}: {sigsys}\n{}{}", output.status, said[0], said[1]);
    assert!(said[0].contains("migrated"), "{scenario}: the child ran nothing: {}", said[0]);
}

#[test]
fn a_migration_over_a_unix_socket_needs_no_other_call() {
    must_migrate("unix completed software all");
}

#[test]
fn a_migration_over_tcp_needs_no_other_call() {
    must_migrate("tcp completed software all");
}

#[test]
fn a_migration_that_asks_the_kernel_for_written_pages_needs_no_other_call() {
    must_migrate("unix completed kernel all");
}

#[test]
fn page_channels_need_no_other_call() {
    // They are idle most of the time: all run in parallel, each in its process.
    std::thread::scope(|scope| {
        for scenario in [
            "channels completed software all",
            "spliced completed software all",
            "spliced cancelled software all",
            "lent completed software all",
            "channels cancelled software all",
        ] {
            scope.spawn(move || must_migrate(scenario));
        }
    });
}

/// Two nodes: the threads of page channels run on theirs.
#[test]
#[ignore = "runs in ci/rxe-guest"]
fn in_rxe_guest_threads_that_go_to_their_node_need_no_other_call() {
    must_migrate("channels completed software all");
    let without = "ramwire-chan-rx/sched_setaffinity";
    let output = run(&format!("channels completed software {without}"));
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
}

#[test]
fn a_cancel_needs_no_other_call() {
    must_migrate("tcp cancelled kernel all");
}

#[test]
fn a_broken_connection_needs_no_other_call() {
    must_migrate("unix broken kernel all");
}

#[test]
fn a_switch_to_postcopy_needs_no_other_call() {
    must_migrate("unix postcopy software all");
    must_migrate("tcp postcopy software all");
    must_migrate("channels postcopy software all");
    let without = "ramwire-chan-rx/UFFDIO_COPY";
    let output = run(&format!("channels postcopy software {without}"));
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
}

#[test]
fn memory_that_is_passed_needs_no_other_call() {
    must_migrate("passed completed software all");
    let without = "ramwire-dest/recvmsg";
    let output = run(&format!("passed completed software {without}"));
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
}

#[test]
fn a_connection_for_urgent_pages_needs_no_other_call() {
    must_migrate("urgent completed none all");
    let without = "ramwire-preempt/readv";
    let output = run(&format!("urgent completed none {without}"));
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
}

#[test]
fn threads_that_write_and_read_a_file_need_no_other_call() {
    must_migrate("file completed none all");
    for without in ["ramwire-file-tx/pwritev", "ramwire-file-rx/pread64"] {
        let output = run(&format!("file completed none {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}

#[test]
fn a_lazy_restore_needs_no_other_call() {
    must_migrate("file lazy none all");
    for without in ["ramwire-file-rx/UFFDIO_COPY", "ramwire-restore/UFFDIO_UNREGISTER"] {
        let output = run(&format!("file lazy none {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}

#[test]
fn snapshots_of_a_running_guest_need_no_other_call() {
    must_migrate("snapshot completed none all");
    for without in ["ramwire-snap/UFFDIO_WRITEPROTECT", "ramwire-snap-tx/sendmsg", "ramwire-snap-vm/futex"] {
        let output = run(&format!("snapshot completed none {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}

#[test]
fn a_server_of_pages_and_who_reads_from_it_need_no_other_call() {
    must_migrate("serve tcp none all");
    must_migrate("serve unix none all");
    for without in ["ramwire-serve/pread64", "ramwire-page-rx/readv"] {
        let output = run(&format!("serve unix none {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}

#[test]
fn a_thread_that_lacks_one_of_its_calls_ends_the_process() {
    for without in [
        "ramwire-source/sendmsg",
        "ramwire-dest/readv",
        "ramwire-digest/exit",
        "ramwire-working/sendmsg",
        "ramwire-log/write",
    ] {
        let output = run(&format!("unix completed software {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
    for without in ["ramwire-faults/sendmsg", "ramwire-dest/UFFDIO_COPY", "ramwire-load/futex"] {
        let output = run(&format!("unix postcopy software {without}"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "without {without}: {}", output.status);
    }
}
