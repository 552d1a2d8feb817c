//! Whose turn it is.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::World;
use crate::session::sim::plan::Side;
use crate::sys::Lock as _;

thread_local! {
    static SIDE: Cell<Option<Side>> = const { Cell::new(None) };
}

/// The world, shared by the parts of one simulation.
#[derive(Clone, Debug)]
pub(in crate::session::sim) struct Sim(Arc<(Mutex<World>, Condvar)>);

impl Sim {
    pub(in crate::session::sim) fn new(world: World) -> Self {
        Self(Arc::new((Mutex::new(world), Condvar::new())))
    }

    /// A look at the world that is no step.
    pub(in crate::session::sim) fn world(&self) -> MutexGuard<'_, World> {
        self.0.0.locked()
    }

    /// A step of the session that runs on this thread; the world is its own until the guard is dropped.
    /// Helper threads of a session look without a step.
    pub(in crate::session::sim) fn enter(&self) -> Turn<'_> {
        let side = SIDE.get();
        let mut turn = Turn { sim: self, side: side.unwrap_or(Side::Source), world: self.world() };
        if side.is_none() {
            return turn;
        }
        turn.step();
        turn.may_pass()
    }

    /// True on the thread of `side`'s session.
    pub(in crate::session::sim) fn is_here(&self, side: Side) -> bool {
        SIDE.get() == Some(side)
    }

    /// Runs `session` as `side`, from its first turn to its end.
    pub(in crate::session::sim) fn run<T>(&self, side: Side, session: impl FnOnce() -> T) -> Option<T> {
        SIDE.set(Some(side));
        let mut world = self.world();
        while world.turn != side {
            world = self.0.1.wait(world).unwrap_or_else(PoisonError::into_inner);
        }
        drop(world);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(session));
        SIDE.set(None);
        let mut world = self.world();
        if let Err(panic) = &outcome {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("?");
            world.violation(format!("{side:?} panicked: {text}"));
            world.pipes[side as usize].closed = true;
            world.pipes[side.other() as usize].reader_gone = true;
        }
        world.done[side as usize] = true;
        world.progress();
        world.turn = side.other();
        self.0.1.notify_all();
        outcome.ok()
    }

    /// Takes the world out when both sides are done.
    pub(in crate::session::sim) fn into_world(self) -> Option<World> {
        let inner = Arc::into_inner(self.0)?;
        Some(inner.0.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The right to change the world.
pub(in crate::session::sim) struct Turn<'a> {
    sim: &'a Sim,
    pub(in crate::session::sim) side: Side,
    pub(in crate::session::sim) world: MutexGuard<'a, World>,
}

impl Turn<'_> {
    /// Lets the surroundings act without giving the turn away.
    pub(in crate::session::sim) fn step(&mut self) {
        self.world.step();
    }

    /// Gives the turn away once in a while.
    pub(in crate::session::sim) fn may_pass(mut self) -> Self {
        let every = self.world.plan.switch_every;
        if self.world.rng.one_in(every) { self.pass() } else { self }
    }

    fn pass(self) -> Self {
        let Self { sim, side, mut world } = self;
        if !world.done[side.other() as usize] {
            world.turn = side.other();
            sim.0.1.notify_all();
            while world.turn != side {
                world = sim.0.1.wait(world).unwrap_or_else(PoisonError::into_inner);
            }
        }
        Self { sim, side, world }
    }

    /// Waits until `ready` has an answer. `None` if no side is left that could provide one: if a peer may fall silent,
    /// that is a timeout; otherwise it is a hang.
    pub(in crate::session::sim) fn wait_for<T>(
        mut self,
        mut ready: impl FnMut(&mut World) -> Option<T>,
    ) -> (Self, Option<T>) {
        let (me, other) = (self.side as usize, self.side.other() as usize);
        loop {
            if let Some(answer) = ready(&mut self.world) {
                return (self, Some(answer));
            }
            if std::mem::take(&mut self.world.timed_out[me]) || self.world.is_endless() {
                return (self, None);
            }
            if self.world.waiting[other] || self.world.done[other] {
                if !self.world.stall_is_expected() {
                    let side = self.side;
                    self.world.violation(format!("both sides wait, or {side:?} waits for one that ended"));
                }
                if self.world.done[other] || self.world.rng.one_in(2) {
                    return (self, None);
                }
                self.world.timed_out[other] = true;
                self.world.waiting[other] = false;
            }
            self.world.waiting[me] = true;
            self = self.pass();
            self.world.waiting[me] = false;
            self.step();
        }
    }
}
