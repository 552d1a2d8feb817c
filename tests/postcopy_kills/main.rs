//! Two processes that switch a running guest to postcopy, again and again under seeds: connections are cut and ends are
//! killed after so many pages have arrived. The guest never runs at both ends, and no page is lost except with the only
//! end that has it.
//!
//! ```text
//! RAMWIRE_KILL_SEED=17 cargo test --all-features --test postcopy_kills -- --nocapture
//! RAMWIRE_KILL_SEEDS=5000 cargo test --all-features --test postcopy_kills -- --nocapture
//! ```
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;
mod ends;
mod faults;
mod log;
mod plan;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Deadline, scratch};
use plan::Plan;

/// Seeds of an ordinary run.
const SEEDS: u64 = 100;
/// Runs at a time.
const AT_A_TIME: usize = 3;

fn start(plan: &Plan, dir: &Path, end: &str) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "ends::an_end", "--ignored", "--nocapture"]);
    for (name, value) in ends::TOLD.into_iter().zip([&plan.seed.to_string(), dir.to_str().unwrap(), end]) {
        command.env(name, value);
    }
    let errors = fs::File::create(dir.join(format!("{end}.stderr"))).unwrap();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors).spawn().unwrap()
}

/// Runs both ends to the end; what they wrote down.
fn run(seed: u64) -> String {
    let (plan, dir) = (Plan::of(seed), scratch());
    let dir = dir.path();
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let deadline = Deadline::seconds(200);
    let mut destination = start(&plan, dir, "destination");
    let listens = || dir.join("address").exists().then_some(());
    deadline.poll("the destination listens", || read("destination.stderr"), listens);
    let mut source = start(&plan, dir, "source");
    let ended = |child: &mut Child, end: &str| -> ExitStatus {
        loop {
            if let Some(status) = child.try_wait().unwrap() {
                return status;
            }
            if deadline.is_over() {
                let _ = (child.kill(), child.wait());
                panic!(
                    "seed {seed}: the {end} does not end\n{}\n{}",
                    read("log"),
                    read(&format!("{end}.stderr"))
                );
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    };
    let statuses = [ended(&mut source, "source"), {
        fs::write(dir.join("source-is-gone"), "").unwrap();
        ended(&mut destination, "destination")
    }];
    for (status, end) in statuses.into_iter().zip(["source", "destination"]) {
        let errors = read(&format!("{end}.stderr"));
        assert!(status.success() || status.signal() == Some(9), "seed {seed}: {end}: {status}\n{errors}");
    }
    read("log")
}

/// The kind of result of a run, by name; an error if it is not permitted.
fn judge(log: &str) -> Result<Vec<&'static str>, String> {
    let must = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_owned()) };
    let (mut source_runs, mut ran_there, mut given) = (false, false, false);
    for line in log.lines() {
        match line {
            "source runs" => {
                must(!ran_there, "the guest runs at its source after it ran at the destination")?;
                source_runs = true;
            }
            "source stands" => (source_runs, given) = (false, true),
            "destination runs" => {
                must(!source_runs && given && !ran_there, "the guest runs at both ends, or twice")?;
                ran_there = true;
            }
            _ => {}
        }
    }
    let of = |end: &str| {
        log.lines().find(|line| line.starts_with(end)).map(|line| (line, line.contains("error=Some")))
    };
    let (source, destination) = (of("source ended"), of("destination ended"));
    let killed = |name: &str| log.lines().any(|line| line.starts_with(name));
    let (cut, dead_source, dead_destination) =
        (killed("Cut"), killed("KillSource"), killed("KillDestination"));
    must(source.is_some() || dead_source, "the source has ended without a word")?;
    must(destination.is_some() != dead_destination, "the destination has ended without a word")?;
    // The paused memory at its source is unchanged, whatever happened to the guest; or it was given back once the
    // destination had taken the guest, started or not.
    let is_taken = |line: &str| line.contains("ended Completed") || line.contains("ended Incomplete");
    let kept = |line: &str| line.contains("wrong=0") || (is_taken(line) && !line.contains("released=0"));
    must(source.is_none_or(|(line, _)| kept(line)), "pages at the source are wrong")?;
    let is = |end: Option<(&str, bool)>, what: &str| end.is_some_and(|(line, _)| line.contains(what));
    let arrived = is(destination, "ended Running wrong=0 read=937");
    must(is(destination, "ended Running") == arrived, "pages at the destination are wrong")?;
    must(!is(source, "ended Completed") || arrived, "completed, and not all of it is there")?;
    must(!is(source, "ended StaysHere") || !ran_there, "stays, and ran there")?;
    must(
        source.is_none_or(|(line, said)| said || line.contains("ended Completed")),
        "a source that says no reason",
    )?;
    must(
        destination.is_none_or(|(line, said)| said || line.contains("ended Running")),
        "a destination that says no reason",
    )?;
    if !dead_source && !dead_destination {
        // No process was killed: the guest is whole at one end, and where it was started it is there.
        must(!ran_there || arrived, "the guest was started, and not all of it has come")?;
        must(
            !ran_there || is(source, "ended Completed"),
            "the guest is there, and its source does not know",
        )?;
    }
    if dead_source && !dead_destination {
        let lost = is(destination, "ended Incomplete") || is(destination, "ended Discarded");
        must(arrived || lost, "the destination does not say what it lacks")?;
    }
    let postcopy = |what: &str| log.lines().any(|line| line.starts_with(what) && line.contains("Postcopy"));
    let facts = [
        ("cut in postcopy, and all has come", postcopy("Cut") && is(source, "ended Completed")),
        ("cut at accept, and all has come", log.contains("Cut at PostcopyPaused") && arrived),
        ("cut, and the guest stays", cut && is(source, "ended StaysHere")),
        (
            "source killed, the rest is lost with it",
            postcopy("KillSource") && is(destination, "ended Incomplete"),
        ),
        ("source killed, and all had come", dead_source && arrived),
        ("source killed, the guest is lost with it", dead_source && is(destination, "ended Discarded")),
        ("destination killed, the guest stays", dead_destination && is(source, "ended StaysHere")),
        (
            "destination killed, the guest is lost with it",
            postcopy("KillDestination") && is(source, "ended Incomplete"),
        ),
        ("memory given back, and all has come", is(source, "ended Completed") && !is(source, "released=0")),
        ("in doubt", is(source, "ended InDoubt")),
        ("no fault", !cut && !dead_source && !dead_destination),
    ];
    Ok(facts.into_iter().filter(|(_, is_so)| *is_so).map(|(name, _)| name).collect())
}

#[test]
fn what_must_not_be_is_found_in_what_the_ends_wrote_down() {
    let good = "source runs\nsource stands\ndestination runs\nCut at PostcopyActive\nsource ended Completed wrong=0 released=0 error=None\n\
                destination ended Running wrong=0 read=937 error=None\n";
    assert_eq!(judge(good), Ok(vec!["cut in postcopy, and all has come"]));
    for (from, to, what) in [
        ("source stands\n", "", "at both ends"),
        ("Cut", "source runs\nCut", "after it ran at the destination"),
        ("wrong=0 released", "wrong=1 released", "at the source are wrong"),
        ("wrong=0 read", "wrong=2 read", "at the destination are wrong"),
        ("read=937", "read=900", "at the destination are wrong"),
        ("source ended Completed", "source ended Incomplete", "says no reason"),
        ("Running wrong=0 read=937", "Incomplete", "not all of it is there"),
        ("destination ended", "nothing", "without a word"),
    ] {
        let found = judge(&good.replace(from, to));
        assert!(found.as_ref().is_err_and(|why| why.contains(what)), "{to:?}: {found:?}");
    }
    let killed = good
        .replace("Cut", "KillSource")
        .replace("source ended Completed wrong=0 released=0 error=None\n", "");
    let lost = killed.replace("Running wrong=0 read=937 error=None", "Incomplete  error=Some(lost)");
    assert_eq!(judge(&lost), Ok(vec!["source killed, the rest is lost with it"]));
    assert!(judge(&lost.replace("error=Some(lost)", "error=None")).is_err(), "it is to be said");
}

#[test]
fn killed_ends_and_cut_connections_in_postcopy_lose_no_page_that_another_end_has() {
    let number = |name: &str| std::env::var(name).ok().map(|value| value.parse::<u64>().unwrap());
    if let Some(seed) = number("RAMWIRE_KILL_SEED") {
        let log = run(seed);
        println!("{:#?}\n{log}", Plan::of(seed));
        println!("{:?}", judge(&log).unwrap());
        return;
    }
    let seeds = number("RAMWIRE_KILL_SEEDS").unwrap_or(SEEDS);
    let (next, found) = (AtomicU64::new(0), Mutex::new((BTreeMap::new(), Vec::new())));
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        break;
                    }
                    let log = run(seed);
                    let (facts, wrong) = &mut *found.lock().unwrap();
                    match judge(&log) {
                        Ok(of) => of.into_iter().for_each(|fact| *facts.entry(fact).or_insert(0) += 1),
                        Err(what) => wrong.push(format!("seed {seed}: {what}\n{log}")),
                    }
                }
            });
        }
    });
    let (facts, wrong) = found.into_inner().unwrap();
    println!("of {seeds} seeds: {facts:#?}");
    assert!(
        wrong.is_empty(),
        "{} of {seeds}: replay a seed with RAMWIRE_KILL_SEED\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    for fact in [
        "cut in postcopy, and all has come",
        "source killed, the rest is lost with it",
        "destination killed, the guest is lost with it",
    ] {
        assert!(seeds < SEEDS || facts.contains_key(fact), "never reached: {fact}, of {facts:?}");
    }
}
