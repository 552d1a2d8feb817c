//! What a transport can do, as numbers, and the rounds it does it in.

/// What the page loop may ask of a transport. Policy reads these; nobody asks which transport it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoverAbilities {
    /// The transport finds zero pages itself: runs may travel as [`Verdict::Unknown`](super::Verdict).
    pub classifies: bool,
    /// Deltas against an earlier copy may be sent.
    pub takes_deltas: bool,
    /// While a round is open no byte may pass on the byte channel.
    pub exclusive_round: bool,
    /// The peer confirms that a page is in its RAM before the migration ends.
    pub confirms_placement: bool,
    /// Bytes follow pages in order on the same channel; a fence is then free.
    pub ordered: bool,
    /// The transport registers guest memory with a device: none of it may be discarded meanwhile.
    pub registers_memory: bool,
    /// Batches that may be out at once.
    pub batches_in_flight: u32,
    /// Pages that fit one batch best.
    pub batch_pages: u32,
}

/// Which round of a migration it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoundKind {
    /// Block lists are exchanged; no pages.
    Setup,
    /// The guest runs.
    Live,
    /// The guest is paused: the last round.
    Final,
}
