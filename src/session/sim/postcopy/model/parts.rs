//! What the modelled destination keeps of a start and of its connections.

use crate::engine::UrgentChannel;

/// Progress of the guest's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    NotYet,
    /// The device state is being loaded, for this many steps; devices request pages as well.
    Loading(u64),
    Done,
    Failed,
}

/// The host page that was partly received on a connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Part {
    /// Its block and first page.
    pub(super) at: Option<(usize, u64)>,
    /// Numbers of the received pages.
    pub(super) numbers: Vec<u64>,
}

/// The connection for urgent pages.
#[derive(Clone, Debug, Default)]
pub(in crate::session::sim::postcopy) struct Urgent {
    pub(super) wanted: Option<UrgentChannel>,
    pub(super) connected: bool,
    /// Its last mark was received.
    pub(super) ended: bool,
    pub(super) input: Vec<u8>,
    pub(super) block: usize,
    /// Pages received on it, and those after a lost connection.
    pub(in crate::session::sim::postcopy) pages: u64,
    pub(in crate::session::sim::postcopy) again: u64,
}

impl Urgent {
    /// A QEMU 7.2 reads nothing before the connection is open.
    pub(super) fn is_waited_for(&self) -> bool {
        self.wanted == Some(UrgentChannel::Early) && !self.connected
    }

    /// It is lost together with the main one.
    pub(super) fn lose(&mut self) {
        (self.connected, self.ended) = (false, false);
        self.input.clear();
    }
}
