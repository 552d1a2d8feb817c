//! Whole migrations of a writing guest, with faults, inside one process and under a seed.
//!
//! Real are the two sessions and everything below them: engines, dirty map, page search, codec, the inline
//! link. Simulated are the guest, its dirty logs, the byte channels and a link that reads pages late and
//! lets them overtake each other. The sessions take turns on two threads, one running at a time; who is
//! next, what the guest writes and when the fault falls due follows from the seed, so that a seed replays
//! exactly:
//!
//! ```text
//! RAMWIRE_SIM_SEED=1234 cargo test --lib session::sim -- --nocapture
//! RAMWIRE_SIM_SEEDS=100000 cargo test --lib session::sim
//! ```
//!
//! | file | what |
//! |------|------|
//! | `plan` | what a seed means |
//! | `world` | the shared state, steps and turns |
//! | `guest` | both copies of the memory, the writer, logs, pause and resume |
//! | `device` | hints, plugs, and which of their pages may be sent |
//! | `channel` | the two byte streams with cuts, resets, stalls and flipped bits |
//! | `link` | pages outside the stream |
//! | `receiver` | the fences of page channels, as the destination keeps them |
//! | `postcopy` | a source that switches, towards a modelled destination |
//! | `reads` | missing pages that are read from the source's memory: its engines with modelled memory and READs |
//! | `resume` | connections that are lost and replaced |
//! | `relay` | a relay's engine between modelled ends |
//! | `checkpoint` | checkpoints: both engines, and the standby's cache, with a modelled guest and connection |
//! | `snapshot` | a snapshot's engine with modelled memory and target; series of snapshots, each against the one before |
//! | `run` | one migration, and what must hold at its end |
//! | `findings` | what the seeds reached and violated; the seed that finds an order that is switched off |
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod channel;
mod checkpoint;
mod colo;
mod device;
mod findings;
mod guest;
mod link;
mod plan;
mod postcopy;
mod reads;
mod receiver;
mod relay;
mod resume;
mod run;
mod snapshot;
mod world;

use std::collections::BTreeMap;
use std::sync::Mutex;

use self::guest::{Guest, PAGE};
use self::plan::Plan;
use self::run::{Run, flipped, run, run_plan, run_seed};
use self::world::Mark;
use crate::engine::{Ending, Outcome, Reason};
use crate::guest::{GuestMemory, MappedGuest};
use crate::session::{Breakage, Error, MemoryCheck, Mismatch, Verify};
use crate::units::BlockOffset;

/// Seeds of an ordinary test run.
const SEEDS: u64 = 3000;
/// Seeds among which each order that is switched off must be found; the first that finds it ends the search.
const MUTANT_SEEDS: u64 = 1000;
const WORKERS: usize = 4;

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().expect("the variable holds a number"))
}

/// How far the seeds got.
#[derive(Default)]
struct Coverage(BTreeMap<&'static str, u64>);

impl Coverage {
    fn count(&mut self, run: &Run) {
        let (sent, arrived, world) = (&run.sent, &run.arrived, &run.world);
        let marked = |mark| world.marks.contains(&mark);
        let pages = sent.statistics.pages;
        let digest = |error: &Option<Error>| matches!(error, Some(Error::Digest(_)));
        let passes = marked(Mark::Passed);
        let facts = [
            ("completed", sent.outcome == Outcome::Completed),
            ("stayed: failed", sent.outcome == Outcome::StaysHere(Reason::Failed)),
            ("stayed: cancelled", sent.outcome == Outcome::StaysHere(Reason::Cancelled)),
            ("stayed: while paused", matches!(sent.outcome, Outcome::StaysHere(_)) && world.paused),
            ("stayed: could not resume", sent.not_resumed && matches!(sent.outcome, Outcome::StaysHere(_))),
            ("in doubt", sent.outcome == Outcome::InDoubt),
            ("in doubt, runs there", sent.outcome == Outcome::InDoubt && arrived.ending == Ending::Running),
            ("stranded", arrived.ending == Ending::Stranded),
            ("two rounds or more", sent.statistics.rounds.len() >= 2),
            ("four rounds or more", sent.statistics.rounds.len() >= 4),
            ("completed into used memory", world.plan.used_every > 0 && sent.outcome == Outcome::Completed),
            ("page sent again", pages.normal + pages.zero > world.plan.total_pages()),
            ("digest equal", arrived.verified && world.plan.verify == Verify::Full),
            ("fingerprints equal", arrived.verified && world.plan.verify == Verify::Fast),
            ("memory compared behind the hand-over", arrived.memory_check.is_some()),
            (
                "flip refused by fingerprints",
                flipped(&world.plan) && world.plan.verify == Verify::Fast && digest(&arrived.error),
            ),
            (
                "flip refused by the digest",
                flipped(&world.plan) && world.plan.verify == Verify::Full && digest(&arrived.error),
            ),
            (
                "flip refused by framing",
                flipped(&world.plan) && matches!(arrived.error, Some(Error::Decode(_))),
            ),
            ("flip without harm", marked(Mark::Flipped) && sent.outcome == Outcome::Completed),
            ("two faults", world.plan.also.is_some() && world.marks.len() >= 2),
            ("cut", marked(Mark::Cut)),
            ("reset", marked(Mark::Reset)),
            ("reset by a close", marked(Mark::Rude)),
            ("stall", marked(Mark::Stalled)),
            ("cancel raised", marked(Mark::CancelRaised)),
            ("cancel too late", marked(Mark::CancelRaised) && sent.outcome == Outcome::Completed),
            ("destination killed", marked(Mark::Killed)),
            ("call failed", marked(Mark::CallFailed)),
            ("call panicked", marked(Mark::Panicked)),
            (
                "may run there, and the source lets go",
                arrived.ending == Ending::Stranded && sent.outcome == Outcome::Completed,
            ),
            ("page lost by a channel", marked(Mark::Dropped)),
            ("loss refused by the counts", matches!(arrived.error, Some(Error::LostPages(_)))),
            ("link full", marked(Mark::Full)),
            ("link declined", marked(Mark::Declined)),
            ("link gave pages back", marked(Mark::Reclaimed)),
            ("pages overtaken", marked(Mark::Overtaken)),
            ("pages overtaken on page channels", world.link.has_barriers() && marked(Mark::Overtaken)),
            ("completed on page channels", world.link.has_barriers() && sent.outcome == Outcome::Completed),
            ("page newer than when it was sent", marked(Mark::Newer)),
            (
                "completed with pages by reference",
                world.link.refers() && sent.outcome == Outcome::Completed && world.plan.fault.is_none(),
            ),
            ("memory registered", marked(Mark::Registered)),
            ("page given back before or after", marked(Mark::GivenBack)),
            ("hint taken", marked(Mark::Hinted)),
            ("hint too late", marked(Mark::HintTooLate)),
            (
                "completed with hints",
                sent.statistics.skipped.hinted > 0 && sent.outcome == Outcome::Completed,
            ),
            ("free page taken again", marked(Mark::Reused)),
            ("memory unplugged", marked(Mark::Unplugged)),
            (
                "completed with unplugged memory",
                marked(Mark::Unplugged) && sent.outcome == Outcome::Completed,
            ),
            ("memory plugged again", marked(Mark::Plugged)),
            ("memory passed", passes && sent.outcome == Outcome::Completed),
            (
                "stayed: memory passed, paused",
                passes && world.paused && matches!(sent.outcome, Outcome::StaysHere(_)),
            ),
            ("in doubt, memory passed", passes && sent.outcome == Outcome::InDoubt),
            ("block ignored", world.plan.ignored.is_some() && sent.outcome == Outcome::Completed),
        ];
        for (name, is_so) in facts {
            *self.0.entry(name).or_default() += u64::from(is_so);
        }
    }
}

/// Runs `work` for each item on a few threads: most of a simulation's time is the hand over of the turn.
fn spread<I: Send, T: Send>(items: impl Iterator<Item = I> + Send, work: impl Fn(I) -> T + Sync) -> Vec<T> {
    let (items, done) = (Mutex::new(items), Mutex::new(Vec::new()));
    let next = || items.lock().unwrap().next();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(item) = next() {
                    let answer = work(item);
                    done.lock().unwrap().push(answer);
                }
            });
        }
    });
    done.into_inner().unwrap()
}

#[test]
fn simulated_migrations_keep_the_guest_whole() {
    if let Some(seed) = number_from("RAMWIRE_SIM_SEED") {
        println!("{:#?}", plan::Plan::of(seed));
        let run = run_seed(seed, Breakage::None).unwrap_or_else(|broken| panic!("seed {seed}: {broken:#?}"));
        println!("{:?} {:?}", run.sent.outcome, run.sent.error);
        println!("{:?} {:?} {:?}", run.arrived.ending, run.arrived.error, run.world.marks);
        return;
    }
    let seeds = number_from("RAMWIRE_SIM_SEEDS").unwrap_or(SEEDS);
    let coverage = Mutex::new(Coverage::default());
    let failed = spread(0..seeds, |seed| match run_seed(seed, Breakage::None) {
        Ok(run) => {
            coverage.lock().unwrap().count(&run);
            None
        }
        Err(broken) => Some((seed, broken)),
    });
    let failed: Vec<_> = failed.into_iter().flatten().collect();
    for (seed, broken) in failed.iter().take(10) {
        println!("seed {seed} failed; replay it with RAMWIRE_SIM_SEED={seed}: {broken:#?}");
    }
    println!("of {seeds} seeds:");
    let coverage = coverage.into_inner().unwrap().0;
    for (fact, seeds) in &coverage {
        println!("{seeds:8}  {fact}");
    }
    assert!(failed.is_empty(), "{} of {seeds} seeds failed", failed.len());
    if seeds >= SEEDS {
        let missing: Vec<_> = coverage.iter().filter(|(_, seeds)| **seeds == 0).collect();
        assert!(missing.is_empty(), "never reached: {missing:?}");
    }
}

#[test]
fn a_seed_replays_exactly() {
    let trace = |seed| {
        let run = run_seed(seed, Breakage::None).unwrap_or_else(|broken| panic!("seed {seed}: {broken:#?}"));
        let world = &run.world;
        let ends = format!("{:?} {:?}", run.sent.outcome, run.arrived.ending);
        (ends, world.steps(), world.now, world.pipes[0].sent, world.pipes[1].sent, world.guest.writes_left)
    };
    for seed in 0..60 {
        assert_eq!(trace(seed), trace(seed), "seed {seed}");
    }
}

/// The symptoms of an order that is switched off: one of these.
fn symptoms(order: Breakage) -> &'static [&'static str] {
    match order {
        Breakage::None => &[],
        Breakage::ReadBeforeProtect | Breakage::SkipFence | Breakage::SkipBarrier => {
            &["started with other memory", "differs from the source's"]
        }
        Breakage::SkipDrain => &["started with other memory", "after the start", "tickets out"],
        Breakage::ForgetUnsent => &["is not dirty"],
        Breakage::LeaveLogsOn => &["a log is on"],
        Breakage::LeaveThrottleOn => &["the guest is throttled"],
        Breakage::StayPaused => &["does not run on at the source"],
        Breakage::CommitBeforeReady => &["COMMIT was said before READY"],
        Breakage::ResumeAfterCommit => &["while it runs on the other side"],
        Breakage::BreakOffAfterCommit => &["a cancel left the guest in doubt"],
        // Pages that are read when they are delivered have the contents of the memory's owner at that time.
        Breakage::CompleteAtCommit => &["started with other memory"],
        Breakage::DieOfPanic => &["panicked"],
        Breakage::TrustPanickedStart => &["while it runs on the other side"],
        Breakage::ResumeBeforeCommit => &["while it runs on the other side"],
        Breakage::LoadBeforeCommit => &["started with other memory", "the source's copy is not whole"],
        Breakage::ForgetPassed => &["is not dirty"],
        Breakage::SkipCounting => &["started with other memory", "a page was lost on its way"],
        Breakage::SkipComparing | Breakage::SkipFingerprints => &["started with other memory"],
        Breakage::PlaceStale | Breakage::SkipPage => {
            &["started with other memory", "differs from the source's"]
        }
        Breakage::LoseDirtyBit => &["was not found to be what was sent", "differs from the source's"],
        // Of a switch to postcopy: `postcopy`.
        Breakage::SkipDiscard
        | Breakage::EndEarly
        | Breakage::FillUnbounded
        | Breakage::SplitHostPage
        | Breakage::OpenUrgentLate
        | Breakage::SkipUrgentAgain
        | Breakage::ReleaseSent
        | Breakage::ReleaseUntaken
        | Breakage::SkipUrgentEnd
        | Breakage::ReconnectUntold
        | Breakage::SkipBitmaps
        | Breakage::KeepCurrentBlock
        | Breakage::SkipLastBarrier
        | Breakage::SpreadEarly
        | Breakage::TakenByBitmap
        | Breakage::EndUnheard
        | Breakage::ResumeAfterLoss => &[],
        // Relays': `relay`, and `relay_tests`.
        Breakage::TellBeforeFarEnd
        | Breakage::DoubtIsFailure
        | Breakage::AskBeforeFarEnd
        | Breakage::GiveBeforeGiven
        | Breakage::ReadWithoutBound
        | Breakage::LeaveUnguarded
        | Breakage::TakenBeforeFarEnd
        | Breakage::UnguardEarly
        | Breakage::LossIsFailure
        | Breakage::ForgetOwed
        | Breakage::AskNobody
        | Breakage::EndWithoutSource
        | Breakage::GiveToGone
        | Breakage::LeaveUrgentUnguarded
        | Breakage::ReportUrgentEarly
        | Breakage::EndWithMain
        | Breakage::EndBeforeUrgent
        | Breakage::LoseRequested
        | Breakage::PartWhenMoved
        | Breakage::TrustUnasked
        | Breakage::ScanBeforeFinish => &[],
        // Of lost connections: `resume`.
        Breakage::TrustUnconfirmed
        | Breakage::TrustLastRound
        | Breakage::GiveUpSilently
        | Breakage::EndUnacknowledged
        | Breakage::TrustFence
        | Breakage::ThrottleWithoutConnection
        | Breakage::SkipResumeFence
        | Breakage::PlaceFromOld
        | Breakage::KeepOldChannels
        | Breakage::KeepOldKeys
        | Breakage::TrustPosted
        | Breakage::TrustCompleted
        | Breakage::CountAtEnd
        | Breakage::KeepOldState
        | Breakage::StartWhenResumed => &[],
        Breakage::RegisterUnpromised => &["started with other memory", "differs from the source's"],
        Breakage::TrustMemory => &["started with other memory", "differs from the source's"],
        Breakage::MarkBeforeCopy => &["was told before it was there"],
        Breakage::HintUnprotected => {
            &["started with other memory", "differs from the source's", "was sent for nothing"]
        }
        Breakage::HintAcrossSync | Breakage::HintOfAnyEpoch | Breakage::ForgetPlugged => {
            &["started with other memory", "differs from the source's"]
        }
        Breakage::ForgetSkipped => &["is not dirty"],
        Breakage::CompareSkipped => &["differs from the source's"],
    }
}

#[test]
fn each_order_switched_off_is_found() {
    let orders = Breakage::ALL.map(|order| (order, symptoms(order)));
    findings::finds_each(MUTANT_SEEDS, orders, |seed, order| {
        let plan = match order.is_about_hints() {
            true => Plan::full_of_hints(seed),
            false => Plan::of(seed),
        };
        run_plan(&plan, order).err().unwrap_or_default()
    });
}

/// Fingerprints locate a difference, and at the right moment: a page that is not placed as it was sent is refused, a
/// page that was not sent because a log lost it is found once the guest runs there.
#[test]
fn fingerprints_tell_which_page_differs() {
    const WANTED: usize = 5;
    for order in [Breakage::PlaceStale, Breakage::SkipPage, Breakage::LoseDirtyBit] {
        let found =
            spread(0..MUTANT_SEEDS, |seed| found_by_fingerprints(seed, order).map(|what| (seed, what)));
        let found: Vec<_> = found.into_iter().flatten().collect();
        println!("{order:?}: found in {} of {MUTANT_SEEDS} seeds: {:?}", found.len(), found.first());
        assert!(found.len() >= WANTED, "{order:?}");
    }
}

/// The report about the pages that differ, if there was one, after proof that it is true.
fn found_by_fingerprints(seed: u64, order: Breakage) -> Option<String> {
    let plan = Plan::of(seed).verified_by_fingerprints();
    let pages = |from: BlockOffset, to: u64| from.0 / PAGE as u64..to / PAGE as u64;
    let run = run(plan.clone(), Guest::new(&plan), order)
        .unwrap_or_else(|broken| panic!("seed {seed}: {broken:#?}"));
    let lost = run.world.violations.iter().find(|broken| broken.contains("started with other memory"));
    if let Some(Error::Digest(mismatch)) = &run.arrived.error {
        assert!(
            lost.is_none() && run.arrived.ending == Ending::Discarded,
            "seed {seed}: the guest ran there"
        );
        if order == Breakage::LoseDirtyBit {
            // Written between its fingerprint and its last send: the bytes are there, by chance.
            return None;
        }
        let Mismatch::Ram { block, from, to } = mismatch else { panic!("seed {seed}: {mismatch}") };
        let [here, there] = &run.world.guest.memory;
        let index = here.table().find(block.as_str()).unwrap();
        for page in pages(*from, *to) {
            let bytes = |guest: &MappedGuest| {
                let mut bytes = vec![0; PAGE];
                guest
                    .region(index)
                    .unwrap()
                    .span(page * PAGE as u64, PAGE as u64)
                    .unwrap()
                    .copy_to(&mut bytes);
                bytes
            };
            assert!(
                bytes(here) != bytes(there),
                "seed {seed}: page {page} of {block} is what it was at the source"
            );
        }
        return Some(mismatch.to_string());
    }
    let lost = lost?;
    assert_eq!(order, Breakage::LoseDirtyBit, "seed {seed}: {lost}");
    assert_eq!(run.sent.memory_check, run.arrived.memory_check, "seed {seed}");
    let Some(MemoryCheck::Differs { block, from, to, .. }) = &run.arrived.memory_check else {
        panic!("seed {seed}: {lost}, and {:?}", run.arrived.memory_check)
    };
    let page = pages(*from, *to).start;
    assert!(
        lost.contains(&format!("page {page} of {block} ")),
        "seed {seed}: {lost}, and block {block} from {from}"
    );
    Some(lost.clone())
}
