//! Who owns the guest, and how a migration ended.

/// How ownership passes to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handover {
    /// Both ends are ramwire: READY, COMMIT, RUNNING.
    Native,
    /// The peer is a QEMU with a return path: the byte that ends the device state is COMMIT, SHUT is RUNNING.
    Shut,
    /// There is no peer that answers (a file, a pipe): the same byte is COMMIT, an orderly close is RUNNING.
    OneWay,
}

impl Handover {
    /// True if the peer reports when it is ready to take over the guest.
    pub fn has_ready(self) -> bool {
        self == Self::Native
    }

    /// True if the peer reports when the guest runs.
    pub fn has_running(self) -> bool {
        self != Self::OneWay
    }
}

/// Why a migration did not complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It was cancelled on request.
    Cancelled,
    /// An error; the session holds it.
    Failed,
}

/// How a migration ended, from the source's point of view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest runs at the destination; the source must drop its copy.
    Completed,
    /// The guest runs here, whole.
    StaysHere(Reason),
    /// COMMIT was sent and no RUNNING arrived: the source keeps the guest paused until an operator decides.
    InDoubt,
    /// The guest runs at the destination, where pages may be missing that only the source has: the connection was lost
    /// in postcopy. The source keeps these pages, and never resumes the guest.
    Incomplete,
}
