//! The plan of a seed: the kinds of source and far end, and the fault.

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
    SourceDies,
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
        Self {
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
        }
    }
}
