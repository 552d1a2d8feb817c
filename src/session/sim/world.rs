//! The one state all parts of a simulation share, and whose turn it is.
//!
//! Both sessions run on threads of their own, but only the one that holds the turn runs. Every call of a
//! session into its surroundings is a step: the guest may write, the link may move a batch, a fault may
//! fall due, the turn may pass to the other side. All of it follows from the seed.

mod turn;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::channel::Pipe;
use super::device::Device;
use super::guest::{Guest, LogState};
use super::link::LinkState;
use super::plan::{Anchor, Fault, Loss, Plan, Rng, Side, Wire};
use crate::sys::CancelToken;
pub(super) use turn::{Sim, Turn};

/// A migration that takes more steps does not end.
const MAX_STEPS: u64 = 60_000;

/// Marks how far a seed got; counted over all seeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Mark {
    Full,
    Declined,
    Reclaimed,
    Overtaken,
    Newer,
    CancelRaised,
    Killed,
    Cut,
    Reset,
    Stalled,
    Flipped,
    CallFailed,
    /// A NIC that has failed for good lost pages that it had acknowledged.
    LostAcknowledged,
    Panicked,
    Dropped,
    Rude,
    Registered,
    GivenBack,
    Hinted,
    HintTooLate,
    Reused,
    Unplugged,
    Plugged,
    Passed,
    /// The source said that its guest stays there.
    GaveUp,
    /// It could not connect again.
    Unreachable,
    /// The source asked for the guest that it has handed over.
    AskedBehindCommit,
    /// The destination took a connection while an older one was still to be taken.
    Overtook,
}

#[derive(Debug)]
pub(super) struct World {
    pub(super) plan: Arc<Plan>,
    pub(super) rng: Rng,
    pub(super) now: Duration,
    pub(super) guest: Guest,
    pub(super) logs: Vec<LogState>,
    pub(super) log_calls: u64,
    pub(super) device: Device,
    /// What the source sends, what the destination sends.
    pub(super) pipes: [Pipe; 2],
    /// Those of earlier connections, and the connections that the destination has not taken.
    old_pipes: Vec<[Pipe; 2]>,
    pub(super) offered: Vec<usize>,
    /// Losses of the connections to come, and one of this connection that is due behind the pause.
    losses: VecDeque<Loss>,
    behind_pause: Option<Loss>,
    pub(super) link: LinkState,
    pub(super) cancel: [Option<CancelToken>; 2],
    pub(super) killed: bool,
    /// The source's guest was asked to pause.
    pub(super) paused: bool,
    /// The destination has sent READY, the source COMMIT (and where it ends), a QEMU SHUT(1).
    pub(super) ready: bool,
    pub(super) commit: Option<u64>,
    pub(super) commit_generation: usize,
    pub(super) commit_read: bool,
    pub(super) refused: bool,
    /// The destination's guest has run.
    pub(super) ran_there: bool,
    pub(super) throttle: u8,
    pub(super) violations: Vec<String>,
    pub(super) marks: Vec<Mark>,
    fault: Option<Fault>,
    steps: u64,
    turn: Side,
    waiting: [bool; 2],
    timed_out: [bool; 2],
    done: [bool; 2],
}

impl World {
    pub(super) fn new(plan: Plan, guest: Guest) -> Self {
        let plan = Arc::new(plan);
        let mut pipes = [Pipe::new(plan.capacity), Pipe::new(plan.capacity)];
        let mut fault = plan.fault;
        if let Some(Fault::Wire { from, anchor: Anchor::Start, at, wire }) = fault {
            pipes[from as usize].fault = Some((at, wire));
            fault = None;
        }
        if let Some((from, at, wire)) = plan.also {
            // If both are in the same direction the first counts.
            pipes[from as usize].fault.get_or_insert((at, wire));
        }
        let losses = plan.losses.iter().copied().collect();
        let mut world = Self {
            old_pipes: Vec::new(),
            offered: Vec::new(),
            losses,
            behind_pause: None,
            commit_generation: 0,
            commit_read: false,
            rng: Rng::new(plan.seed ^ 0x5eed),
            now: Duration::ZERO,
            logs: plan.logs.iter().map(|kind| LogState::new(*kind, &plan)).collect(),
            log_calls: 0,
            device: Device::new(&plan),
            pipes,
            link: LinkState::new(&plan),
            cancel: [None, None],
            killed: false,
            paused: false,
            ready: false,
            commit: None,
            refused: false,
            ran_there: false,
            throttle: 20,
            violations: Vec::new(),
            marks: Vec::new(),
            fault,
            steps: 0,
            turn: Side::Source,
            waiting: [false; 2],
            timed_out: [false; 2],
            done: [false; 2],
            guest,
            plan,
        };
        world.arm();
        world
    }

    /// The number of the newest connection.
    pub(super) fn generation(&self) -> usize {
        self.old_pipes.len()
    }

    /// Both directions of a connection.
    pub(super) fn pipes_of(&mut self, generation: usize) -> &mut [Pipe; 2] {
        self.old_pipes.get_mut(generation).unwrap_or(&mut self.pipes)
    }

    /// What `side` sends on a connection.
    pub(super) fn pipe(&mut self, generation: usize, side: Side) -> &mut Pipe {
        &mut self.pipes_of(generation)[side as usize]
    }

    /// The source connects again: the number of the new connection.
    pub(super) fn connect_again(&mut self) -> usize {
        let capacity = self.plan.capacity;
        let old = std::mem::replace(&mut self.pipes, [Pipe::new(capacity), Pipe::new(capacity)]);
        self.old_pipes.push(old);
        let generation = self.generation();
        self.offered.push(generation);
        self.arm();
        self.progress();
        generation
    }

    /// The loss of the newest connection is due.
    fn arm(&mut self) {
        self.behind_pause = None;
        let next = self.losses.pop_front();
        if self.plan.lost_for_ever && self.losses.is_empty() {
            self.losses.extend(next);
        }
        match next {
            Some(Loss { from, anchor: Anchor::Start, at, wire }) => {
                self.pipes[from as usize].fault.get_or_insert((at, wire));
            }
            late => self.behind_pause = late,
        }
    }

    /// The destination has read bytes of a connection.
    pub(super) fn commit_may_be_read(&mut self, generation: usize, from: Side) {
        let here = from == Side::Source && generation == self.commit_generation;
        let read = self.pipe(generation, from).read;
        self.commit_read |= here && self.commit.is_some_and(|end| read >= end);
    }

    pub(super) fn violation(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    pub(super) fn mark(&mut self, mark: Mark) {
        if !self.marks.contains(&mark) {
            self.marks.push(mark);
        }
    }

    /// Something changed that the other side may wait for.
    pub(super) fn progress(&mut self) {
        self.waiting = [false; 2];
    }

    /// Sending takes time.
    pub(super) fn bytes_leave(&mut self, bytes: u64) {
        self.now += Duration::from_nanos(bytes * 1_000_000 / self.plan.bytes_per_ms);
    }

    /// No session gets anywhere any more: every call fails from here on.
    pub(super) fn is_endless(&self) -> bool {
        self.steps > MAX_STEPS
    }

    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    pub(super) fn is_done(&self, side: Side) -> bool {
        self.done[side as usize]
    }

    /// True once for the call the plan wants to fail.
    pub(super) fn fails(&mut self, wanted: impl Fn(&Fault) -> bool) -> bool {
        let fails = self.fault.as_ref().is_some_and(wanted);
        if fails {
            self.fault = None;
            self.mark(Mark::CallFailed);
        }
        fails
    }

    /// True if a call that fails is to panic.
    pub(super) fn panics(&mut self) -> bool {
        if self.plan.panics && !self.killed {
            self.mark(Mark::Panicked);
        }
        self.plan.panics && !self.killed
    }

    /// The guest was paused: what counts from there is due.
    pub(super) fn pause_begins(&mut self) {
        self.paused = true;
        if let Some(Loss { from, at, wire, .. }) = self.behind_pause.take() {
            let pipe = &mut self.pipes[from as usize];
            pipe.fault = Some((pipe.sent + at, wire));
        }
        let steps = self.steps;
        match &mut self.fault {
            Some(Fault::Wire { from, anchor: Anchor::Pause, at, wire }) => {
                let pipe = &mut self.pipes[*from as usize];
                pipe.fault = Some((pipe.sent + *at, *wire));
                self.fault = None;
            }
            Some(Fault::Cancel { anchor, at, .. } | Fault::Kill { anchor, at })
                if *anchor == Anchor::Pause =>
            {
                *anchor = Anchor::Start;
                *at += steps;
            }
            _ => {}
        }
    }

    fn step(&mut self) {
        self.steps += 1;
        if self.steps == MAX_STEPS {
            self.violation(format!("no end after {MAX_STEPS} steps"));
        }
        if self.is_endless() {
            self.progress();
            return;
        }
        match self.fault {
            Some(Fault::Cancel { side, anchor: Anchor::Start, at }) if at <= self.steps => {
                self.fault = None;
                self.mark(Mark::CancelRaised);
                self.progress();
                if let Some(token) = &self.cancel[side as usize] {
                    token.cancel();
                }
            }
            Some(Fault::Kill { anchor: Anchor::Start, at }) if at <= self.steps => self.kill(),
            _ => {}
        }
        self.guest_writes();
        self.plugs();
        self.link_moves();
    }

    /// The destination's host dies, its guest with it.
    fn kill(&mut self) {
        self.fault = None;
        self.killed = true;
        self.mark(Mark::Killed);
        self.guest.running[Side::Target as usize] = false;
        let reset = self.rng.one_in(2);
        for pipe in &mut self.pipes {
            pipe.hang_up(reset);
        }
        self.progress();
    }

    pub(super) fn stall_is_expected(&self) -> bool {
        self.is_endless() || !self.plan.losses.is_empty() || self.pipes.iter().any(|pipe| pipe.may_stall)
    }
}

/// True for a fault on the wire that may leave an end waiting for bytes that never come.
pub(super) fn may_stall(wire: Wire) -> bool {
    matches!(wire, Wire::Stall | Wire::Flip(_))
}
