//! What a transport can do, and the kinds of rounds.

/// What the page loop may use of a transport. Policy depends only on these values, never on the kind of transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoverAbilities {
    /// The transport finds zero pages itself: runs may be sent as [`Verdict::Unknown`](super::Verdict).
    pub classifies: bool,
    /// Deltas against an earlier copy may be sent.
    pub takes_deltas: bool,
    /// While a round is open no byte may be sent on the byte channel.
    pub exclusive_round: bool,
    /// The peer confirms that a page is in its RAM before the migration ends.
    pub confirms_placement: bool,
    /// Bytes follow pages in order on the same channel; a fence then costs nothing.
    pub ordered: bool,
    /// The transport registers guest memory with a device: no memory may be discarded meanwhile.
    pub registers_memory: bool,
    /// After a switch to postcopy the peer reads missing pages from this end's memory itself.
    pub serves_reads: bool,
    /// Maximum number of batches in flight.
    pub batches_in_flight: u32,
    /// Best number of pages in one batch.
    pub batch_pages: u32,
}

/// Kind of a round of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundKind {
    /// Block lists are exchanged; no pages.
    Setup,
    /// The guest runs.
    Live,
    /// The guest is paused: the last round.
    Final,
}
