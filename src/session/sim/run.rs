//! One simulation: both sessions from their first to their last step, and what must hold then.

use std::sync::Arc;
use std::time::Duration;

use super::channel::{MIGRATION_ID, SimSink, SimSource};
use super::device::{SimDiscards, hint_breakage};
use super::guest::{Guest, PAGE, SimControl, SimLog, SimMemory, SimProvider, Watcher};
use super::link::{SimLink, SmallBatches};
use super::plan::{Fault, LinkKind, PeerKind, Plan, Side, Wire};
use super::resume::{Again, Takes};
use super::world::{Mark, Sim, World};
use crate::engine::{Ending, Outcome, Reason};
use crate::guest::DirtySource;
use crate::ram::ClearShift;
use crate::session::{
    Breakage, Clock, DestinationConnection, DestinationGuest, DestinationReport, DestinationSession,
    DestinationSettings, Error, MemoryCheck, Peer, SourceConnection, SourceGuest, SourceReport,
    SourceSession, SourceSettings, Verify,
};
use crate::stream::qemu::file::Configuration;
use crate::transport::{DeltaCacheSize, InlineLink, SourceLink};
use crate::units::{BlockIndex, PageIndex};

/// Maximum number of rounds of a migration whose guest becomes idle.
const MAX_ROUNDS: usize = 250;

/// Time as the simulated bytes take it.
struct SimClock(Sim);

impl Clock for SimClock {
    fn now(&self) -> Duration {
        self.0.device_acts(Side::Source);
        let mut world = self.0.world();
        world.now += Duration::from_micros(20);
        world.now
    }
}

/// A migration that has ended.
pub(super) struct Run {
    pub(super) world: World,
    pub(super) sent: SourceReport,
    pub(super) arrived: DestinationReport,
}

fn with_deltas(link: InlineLink, pages: u64) -> InlineLink {
    if pages == 0 { link } else { link.with_deltas(DeltaCacheSize::new(pages * PAGE as u64)) }
}

fn source(sim: &Sim, breakage: Breakage) -> SourceSession {
    let plan = Arc::clone(&sim.world().plan);
    let memory = SimMemory::new(sim, Side::Source);
    let log = |index| Arc::new(SimLog { sim: sim.clone(), index }) as Arc<dyn DirtySource>;
    let control = Box::new(SimControl { sim: sim.clone(), side: Side::Source });
    let guest =
        SourceGuest { memory: memory.clone(), dirty: (0..plan.logs.len()).map(log).collect(), control };
    let link: Box<dyn SourceLink> = match plan.link {
        LinkKind::Inline { batch_pages } => {
            let sink = Box::new(SimSink { sim: sim.clone(), side: Side::Source, generation: 0 });
            Box::new(SmallBatches {
                sim: sim.clone(),
                link: with_deltas(InlineLink::new(sink, memory), plan.delta_pages),
                pages: batch_pages,
            })
        }
        LinkKind::Late(link) => Box::new(SimLink::new(sim, link)),
    };
    let back = SimSource { sim: sim.clone(), from: Side::Target, generation: 0 };
    let configuration = Configuration { machine: "none".into(), ..Configuration::default() };
    let micros = plan.downtime_pages * PAGE as u64 * 1000 / plan.bytes_per_ms;
    let lossy = !plan.losses.is_empty();
    let settings = SourceSettings {
        downtime_limit: Duration::from_micros(micros),
        verify: if plan.peer == PeerKind::Qemu { Verify::Off } else { plan.verify },
        peer: match plan.peer {
            PeerKind::Greeted => None,
            PeerKind::Ramwire => Some(Peer::Ramwire),
            PeerKind::Qemu => Some(Peer::Qemu),
        },
        clear_shift: ClearShift::new(plan.clear_shift).unwrap(),
        pass_memory: !plan.passed.is_empty(),
        migration_id: MIGRATION_ID,
        reconnect_timeout: if lossy { Again::TIMEOUT } else { Duration::ZERO },
        ..SourceSettings::new(configuration)
    };
    let mut session = SourceSession::new(guest, SourceConnection::new(link, Some(Box::new(back))), settings);
    session.count_time_by(Box::new(SimClock(sim.clone())));
    session.break_order(breakage);
    if lossy {
        session = session.with_reconnect(Box::new(Again(sim.clone())));
    }
    if plan.hint_every > 0 {
        let hints = session.page_hints();
        hints.break_orders(hint_breakage(breakage));
        sim.world().device.hints = Some(hints);
    }
    if !plan.plugs.is_empty() {
        session = session.with_discards(Arc::new(SimDiscards(sim.clone())));
    }
    sim.world().cancel[0] = Some(session.cancel_token());
    session
}

fn destination(sim: &Sim, breakage: Breakage) -> DestinationSession {
    let plan = Arc::clone(&sim.world().plan);
    let (watched, lossy) = (plan.watched, !plan.losses.is_empty());
    let reconnect_timeout = if lossy { Duration::from_secs(600) } else { Duration::ZERO };
    let session = DestinationSession::new(
        DestinationGuest {
            memory: Box::new(SimProvider(sim.clone())),
            control: Box::new(SimControl { sim: sim.clone(), side: Side::Target }),
        },
        DestinationConnection::new(
            Box::new(SimSource { sim: sim.clone(), from: Side::Source, generation: 0 }),
            Some(Box::new(SimSink { sim: sim.clone(), side: Side::Target, generation: 0 })),
        ),
        DestinationSettings { take_memory: true, reconnect_timeout, ..DestinationSettings::default() },
    );
    sim.world().cancel[1] = Some(session.cancel_token());
    let mut session =
        if watched { session.with_incoming_observer(Box::new(Watcher::new(sim))) } else { session };
    session.break_order(breakage);
    if lossy {
        session.resumed_by(Box::new(Takes(sim.clone())));
    }
    // The simulation's steps know nothing of a third thread, and a busy machine may take a second for one.
    session.keep_alive_every(Duration::MAX);
    session
}

/// Runs `plan` over `guest`.
///
/// # Errors
/// What was violated, if a session did not even end with a report.
pub(super) fn run(plan: Plan, guest: Guest, breakage: Breakage) -> Result<Run, Vec<String>> {
    let sim = Sim::new(World::new(plan, guest));
    let (source, destination) = (source(&sim, breakage), destination(&sim, breakage));
    let (sent, arrived) = std::thread::scope(|scope| {
        let far = scope.spawn(|| sim.run(Side::Target, || destination.run()));
        let sent = sim.run(Side::Source, || {
            let report = source.run();
            if report.outcome == Outcome::Completed {
                sim.world().reuse_memory();
            }
            report
        });
        (sent, far.join().ok().flatten())
    });
    let hints = sim.world().device.hints.take();
    drop(hints);
    let Some(world) = sim.into_world() else { return Err(vec!["something outlived its session".into()]) };
    match (sent, arrived) {
        (Some(sent), Some(arrived)) => Ok(Run { world, sent, arrived }),
        _ => Err(world.violations),
    }
}

impl Run {
    /// All conditions that must hold after any run, added to the violations during the run.
    pub(super) fn check(&mut self) {
        let mut broken = Vec::new();
        let mut must = |holds: bool, what: &str| {
            if !holds {
                broken.push(what.to_owned());
            }
        };
        let (world, outcome, ending) = (&self.world, self.sent.outcome, self.arrived.ending);
        let [here, there] = world.guest.running;
        let marked = |mark| world.marks.contains(&mark);
        must(self.sent.statistics.rounds.len() <= MAX_ROUNDS, "the rounds do not end");
        must(
            here || outcome == Outcome::Completed
                || marked(Mark::Passed) && world.ran_there
                || world.guest.differs(Side::Source, Side::Source).is_none(),
            "the source's copy is not whole",
        );
        must(
            ending != Ending::Running || matches!(outcome, Outcome::Completed | Outcome::InDoubt),
            "the guest runs at the destination and the source does not let go",
        );
        // Its start panicked, and it could not be stopped: a QEMU receives the report that it runs there.
        let may_run = there && ending == Ending::Stranded && world.marks.contains(&Mark::Panicked);
        must(
            ending != Ending::Stranded
                || outcome == Outcome::InDoubt
                || may_run && outcome == Outcome::Completed,
            "the destination holds the only guest and the source does not know",
        );
        must(
            there == (ending == Ending::Running) || world.killed || may_run,
            "the destination's report is wrong",
        );
        if there && let Some(page) = world.guest.differs(Side::Target, Side::Target) {
            must(false, &format!("after the start: {page}"));
        }
        must(
            // Before the fence behind it is confirmed, it may be sent again on another connection.
            outcome != Outcome::Completed || !marked(Mark::Dropped) || !world.plan.losses.is_empty(),
            "a page was lost on its way and the migration is called complete",
        );
        let lossy = !world.plan.losses.is_empty();
        let only = world.plan.fault.filter(|_| !lossy && world.plan.also.is_none() && !marked(Mark::Dropped));
        let faultless = match world.plan.fault {
            _ if marked(Mark::Dropped) => false,
            // Without a kernel's timers a silent network can't be told from a destination that compares slowly.
            None if marked(Mark::Stalled) && matches!(self.sent.error, Some(Error::NoAnswer { .. })) => false,
            // Lost before the destination had all that it needs to wait for another.
            None if lossy => outcome == Outcome::Completed || self.sent.statistics.lost.count > 0,
            None => true,
            Some(Fault::Log { .. } | Fault::Link { .. }) => world.marks.is_empty(),
            _ => false,
        };
        if faultless {
            must(outcome == Outcome::Completed, "nothing was wrong and the guest did not move");
            must(self.arrived.verified == self.digest_is_due(), "the digest was not compared");
            let looked = self.digest_is_due() && world.plan.verify == Verify::Fast;
            // The connection may be lost behind RUNNING.
            let checked =
                |check: &Option<MemoryCheck>| lossy && matches!(check, Some(MemoryCheck::NotMade { .. }));
            let equal = |check: &Option<MemoryCheck>| matches!(check, Some(MemoryCheck::Equal { .. }));
            let checks = [&self.sent.memory_check, &self.arrived.memory_check];
            must(
                checks.iter().all(|check| equal(check) == looked || checked(check)),
                "the source's memory was not found to be what was sent",
            );
            must(
                looked || checks.iter().all(|check| check.is_none()),
                "memory was looked at, and nobody asked for it",
            );
        }
        if matches!(only, Some(Fault::Cancel { side: Side::Source, .. })) {
            must(outcome != Outcome::InDoubt, "a cancel left the guest in doubt");
            must(outcome != Outcome::StaysHere(Reason::Failed), "a cancel is told as a failure");
        }
        let native = world.plan.peer != PeerKind::Qemu;
        if native && matches!(only, Some(Fault::Cancel { side: Side::Target, .. })) {
            must(outcome != Outcome::InDoubt, "a cancel at the destination left the guest in doubt");
        }
        if matches!(only, Some(Fault::Load)) {
            // Memory that was passed is handed over before the device state is loaded.
            let late = marked(Mark::Passed) && outcome == Outcome::InDoubt;
            must(
                late || matches!(outcome, Outcome::StaysHere(_)),
                "the peer refused and the guest is not here",
            );
        }
        let log_failed = matches!(world.plan.fault, Some(Fault::Log { .. }));
        must(world.throttle == 0, "the guest is throttled");
        must(log_failed || world.logs.iter().all(|log| !log.on), "a log is on");
        must(!world.guest.promised, "the guest may give no page back although the migration has ended");
        match outcome {
            Outcome::Completed => {
                must(!here, "the guest runs at the source although it was given away");
                must(there || world.killed, "the guest runs nowhere");
            }
            Outcome::StaysHere(_) => {
                let said = matches!(self.sent.error, Some(Error::NotResumed { .. }));
                let not_resumed = world.plan.not_resumed && world.paused && said && self.sent.not_resumed;
                must(here || not_resumed, "the guest does not run on at the source");
                must(here || !self.sent.guest_is_safe_here(), "the source's report is wrong");
                must(self.unsent_is_dirty(), "a page that is not at the destination is not dirty");
                must(self.sent.error.is_some(), "no reason is given");
                let reachable = !world.killed && !marked(Mark::Unreachable);
                let waits = self.sent.statistics.lost.count > 0
                    && !matches!(self.sent.error, Some(Error::PeerFailed { .. }));
                must(
                    marked(Mark::GaveUp) || !waits || !reachable,
                    "the destination was not told that the guest stays at the source",
                );
                let at_source = matches!(only, Some(Fault::Log { .. } | Fault::Pause { .. } | Fault::Save));
                if at_source && world.marks.contains(&Mark::Panicked) {
                    let text = self
                        .sent
                        .error
                        .as_ref()
                        .map(|error| crate::error::Chain(error).to_string())
                        .unwrap_or_default();
                    must(text.contains("as the plan wants it"), "the panic's text is lost");
                }
            }
            Outcome::Incomplete => must(false, "a precopy is never incomplete"),
            Outcome::InDoubt => {
                must(!here, "the source's guest runs although the outcome is in doubt");
                must(world.commit.is_some(), "in doubt before COMMIT");
                must(!lossy || world.killed, "in doubt although both ends live");
                must(self.sent.error.is_some(), "no reason is given");
            }
        }
        if !broken.is_empty() {
            let (sent, arrived) = (&self.sent, &self.arrived);
            broken.push(format!("source: {:?}, {:?}", sent.outcome, sent.error));
            broken.push(format!("destination: {:?}, {:?}", arrived.ending, arrived.error));
        }
        self.world.violations.append(&mut broken);
    }

    fn digest_is_due(&self) -> bool {
        self.world.plan.verify != Verify::Off && self.world.plan.peer != PeerKind::Qemu
    }

    /// Where nothing confirms, every page is; else every page that was not confirmed.
    fn unsent_is_dirty(&self) -> bool {
        let confirms = matches!(self.world.plan.link, LinkKind::Late(link) if link.confirms);
        let travels = |(block, _): &(usize, _)| self.world.plan.ignored != Some(*block as u32);
        self.world.plan.blocks.iter().enumerate().filter(travels).all(|(block, (pages, _))| {
            let Some(dirty) = self.sent.dirty.block(BlockIndex(block as u32)) else { return false };
            let confirmed = &self.world.link.confirmed[block];
            (0..*pages).map(PageIndex).all(|page| dirty.get(page) || confirms && confirmed.get(page))
        })
    }
}

/// Runs a seed to its end: the migration, and, where the guest is at the source, a second one over a clean
/// channel.
///
/// # Errors
/// Everything that was violated.
pub(super) fn run_seed(seed: u64, breakage: Breakage) -> Result<Run, Vec<String>> {
    run_plan(&Plan::of(seed), breakage)
}

/// As [`run_seed`], for a plan of another make.
pub(super) fn run_plan(planned: &Plan, breakage: Breakage) -> Result<Run, Vec<String>> {
    let guest = Guest::new(planned);
    let mut first = run(planned.clone(), guest, breakage)?;
    first.check();
    if !first.world.violations.is_empty() {
        return Err(first.world.violations);
    }
    // In doubt, and the destination is known to be dead or without the guest: the operator resumes it at the source.
    let resumed = first.sent.outcome == Outcome::InDoubt && first.arrived.ending == Ending::Discarded;
    if !first.sent.guest_is_safe_here() && !resumed {
        return Ok(first);
    }
    first.world.guest.running[Side::Source as usize] = true;
    let discarded = first.arrived.ending == Ending::Discarded;
    let plan = Plan {
        writes: 30,
        peer: PeerKind::Ramwire,
        verify: Verify::Full,
        link: LinkKind::Inline { batch_pages: 64 },
        fault: None,
        also: None,
        drops: None,
        losses: Vec::new(),
        lost_for_ever: false,
        delta_pages: 0,
        ..planned.clone()
    };
    let nothing = Plan { blocks: Vec::new(), unplugged: Default::default(), ..plan.clone() };
    let empty = Guest::new(&nothing);
    let guest = std::mem::replace(&mut first.world.guest, empty).again(&plan, discarded);
    let mut second = run(plan, guest, Breakage::None)?;
    second.check();
    let again = |what: String| format!("second migration: {what}");
    match second.world.violations.is_empty() {
        true => Ok(first),
        false => Err(second.world.violations.into_iter().map(again).collect()),
    }
}

/// True if a flip met bytes that a digest or the framing had to refuse.
pub(super) fn flipped(plan: &Plan) -> bool {
    matches!(plan.fault, Some(Fault::Wire { wire: Wire::Flip(_), .. }))
}
