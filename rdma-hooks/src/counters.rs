//! Counters of one end of a migration.

use std::ops::{AddAssign, Sub};

use crate::fabric::Registration;

/// Counts since the connection was made. They only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// RDMA WRITEs of guest memory posted.
    pub writes_posted: u64,
    /// Number of these that were signalled.
    pub writes_signalled: u64,
    /// Number of doorbells: posts of new requests to the device.
    pub doorbells: u64,
    /// Bytes of guest memory in the writes.
    pub bytes_written: u64,
    /// Zero ranges sent as messages instead of written.
    pub zero_ranges: u64,
    /// Bytes in them.
    pub zero_bytes: u64,
    /// Memory registrations at this end.
    pub registrations: u64,
    /// Bytes in them.
    pub registered_bytes: u64,
    /// Of the registrations, those of memory that need not be resident.
    pub on_demand_registrations: u64,
    /// Registrations given back to stay within the pin budget.
    pub unregistrations: u64,
    /// Control messages sent, pieces of the byte stream among them.
    pub messages_sent: u64,
    /// Control messages received.
    pub messages_received: u64,
    /// Bytes of the byte stream sent or received.
    pub stream_bytes: u64,
    /// Probes of a quiet peer.
    pub probes: u64,
    /// Polls of the completion queues.
    pub polls: u64,
    /// Sleeps until the device reports an event; each costs a few system calls.
    pub waits: u64,
}

impl Counters {
    pub(crate) fn registered(&mut self, registration: &Registration) {
        self.registrations += 1;
        self.registered_bytes += registration.len;
        self.on_demand_registrations += u64::from(registration.on_demand);
    }

    /// Each count of `self` with the same count of `other`.
    fn with(mut self, other: Self, join: impl Fn(u64, u64) -> u64) -> Self {
        let pairs = [
            (&mut self.writes_posted, other.writes_posted),
            (&mut self.writes_signalled, other.writes_signalled),
            (&mut self.doorbells, other.doorbells),
            (&mut self.bytes_written, other.bytes_written),
            (&mut self.zero_ranges, other.zero_ranges),
            (&mut self.zero_bytes, other.zero_bytes),
            (&mut self.registrations, other.registrations),
            (&mut self.registered_bytes, other.registered_bytes),
            (&mut self.on_demand_registrations, other.on_demand_registrations),
            (&mut self.unregistrations, other.unregistrations),
            (&mut self.messages_sent, other.messages_sent),
            (&mut self.messages_received, other.messages_received),
            (&mut self.stream_bytes, other.stream_bytes),
            (&mut self.probes, other.probes),
            (&mut self.polls, other.polls),
            (&mut self.waits, other.waits),
        ];
        for (ours, theirs) in pairs {
            *ours = join(*ours, theirs);
        }
        self
    }
}

impl AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        *self = self.with(other, u64::saturating_add);
    }
}

impl Sub for Counters {
    type Output = Self;

    /// The counts since `earlier`.
    fn sub(self, earlier: Self) -> Self {
        self.with(earlier, u64::saturating_sub)
    }
}
