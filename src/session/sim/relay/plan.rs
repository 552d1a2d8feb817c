//! The plan of a seed: the kinds of source and far end, and the fault.

use super::PAGES;
use crate::session::sim::plan::Rng;

/// What the guest's source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceKind {
    /// Hands over the guest with its last byte, and resumes it if its connection closes or reports a failure.
    Qemu,
    /// The same without a return path: it receives nothing, and has released the guest.
    OneWay,
    /// Hands over the guest when it is requested, and never resumes it by itself after that.
    Ramwire,
}

/// What the far end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FarKind {
    Qemu,
    Ramwire,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    RelayDies,
    FarDies,
    /// Its connection breaks after it was given the guest; it lives.
    FarCut,
    SourceDies,
    /// Its connection breaks; it lives, and what it has sent still arrives.
    SourceCut,
    /// Its connection for urgent pages breaks.
    UrgentCut,
    Cancel,
}

#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) seed: u64,
    pub(super) source: SourceKind,
    pub(super) far: FarKind,
    /// Rounds before the guest is paused.
    pub(super) rounds: u64,
    /// The far end makes progress in one of this many steps.
    pub(super) far_slowness: u64,
    /// Steps of the far end between COMMIT and its answer.
    pub(super) far_thinks: u64,
    /// It can't load the device state.
    pub(super) far_refuses: bool,
    pub(super) fault: Option<Fault>,
    /// The step at which it happens.
    pub(super) at: u64,
    pub(super) counts_from_giving: bool,
    /// An operator handles a guest in doubt.
    pub(super) operator: bool,
    /// The source switches to postcopy after so many pages.
    pub(super) switch: Option<u64>,
    /// In postcopy a QEMU before 10.2: it never resumes a guest whose package it has sent.
    pub(super) old: bool,
    /// In postcopy the source sends at first only what it is asked for.
    pub(super) lazy: bool,
    /// Steps of the source for which an answer is on its way, about.
    pub(super) answer_takes: u64,
    /// The page that the far end touches while it loads the device state.
    pub(super) loads: usize,
    /// In postcopy requested pages travel on connections of their own.
    pub(super) preempt: bool,
}

impl Plan {
    pub(super) fn of(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let fault = match rng.below(8) {
            0 => None,
            1..=3 => Some(Fault::RelayDies),
            4 | 5 => Some(Fault::FarDies),
            6 => Some(Fault::SourceDies),
            _ => Some(Fault::Cancel),
        };
        let counts_from_giving = rng.one_in(2);
        let plan = Self {
            seed,
            source: rng.pick(&[SourceKind::Qemu, SourceKind::Qemu, SourceKind::OneWay, SourceKind::Ramwire]),
            far: rng.pick(&[FarKind::Qemu, FarKind::Ramwire]),
            rounds: rng.below(3),
            far_slowness: rng.pick(&[1, 2, 4]),
            far_thinks: rng.below_one_of(&[2, 60, 200]),
            far_refuses: rng.one_in(8),
            fault,
            at: if counts_from_giving { rng.below(600) } else { rng.below(2500) },
            counts_from_giving,
            operator: !rng.one_in(4),
            switch: None,
            old: false,
            lazy: false,
            answer_takes: 1,
            loads: 0,
            preempt: false,
        };
        plan.or_postcopy(&mut rng).or_cut(&mut rng).or_preempt(&mut rng)
    }

    fn or_cut(mut self, rng: &mut Rng) -> Self {
        if self.fault == Some(Fault::SourceDies) && rng.one_in(2) {
            self.fault = Some(Fault::SourceCut);
        }
        self
    }

    fn or_preempt(mut self, rng: &mut Rng) -> Self {
        self.preempt = self.switch.is_some() && !rng.one_in(3);
        if self.preempt && self.fault == Some(Fault::SourceCut) && rng.one_in(2) {
            self.fault = Some(Fault::UrgentCut);
        }
        self
    }

    fn or_postcopy(mut self, rng: &mut Rng) -> Self {
        if self.source == SourceKind::OneWay || rng.one_in(2) {
            return self;
        }
        self.switch = Some(rng.below(60));
        self.old = self.source == SourceKind::Qemu && rng.one_in(3);
        self.lazy = rng.one_in(3);
        self.answer_takes = rng.pick(&[1, 10, 60]);
        self.loads = rng.below(PAGES as u64) as usize;
        if self.fault == Some(Fault::FarDies) && rng.one_in(2) {
            self.fault = Some(Fault::FarCut);
        }
        self
    }
}
