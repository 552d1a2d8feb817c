//! What a source may do, and how long it may take.

use std::time::Duration;

use crate::engine::Handover;
use crate::units::Rate;

/// When the guest is paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switchover {
    /// When the rest fits the downtime limit at the measured rate.
    WhenItFits,
    /// When the guest's own source reports that it stopped (a relay).
    WhenUpstreamStops,
}

/// What happens to a migration that has not reached its switchover in time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It ends; the guest stays.
    #[default]
    Cancel,
    /// The guest is paused and migrates, however long the downtime is.
    Finish,
    /// The guest is paused for a moment and runs at the destination before all its memory has arrived; only if postcopy
    /// was announced.
    Postcopy,
}

/// When a guest whose memory does not converge is switched to postcopy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PostcopyRule {
    /// When it is requested.
    OnCommand,
    /// After so many rounds; 0: before the first page. A guest whose memory fits the downtime limit by then is migrated
    /// without postcopy.
    AfterRounds(u32),
    /// After this time from the start. A guest whose memory fits the downtime limit by then is migrated without
    /// postcopy.
    AfterTime(Duration),
}

/// When the connection for urgent pages of a postcopy is made (QEMU: postcopy-preempt), the first and each after a lost
/// one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UrgentChannel {
    /// Right after the first bytes of the main connection: only then does the peer read on (QEMU 7.2).
    Early,
    /// When the peer has shown that it reads, and before the guest is paused, or more pages are sent (QEMU from 8.0 on,
    /// a ramwire).
    Late,
}

/// How long the peer's answers are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AnswerTimeouts {
    /// From the last byte to READY, while the peer reports that it is busy.
    pub ready: Duration,
    /// Without a sign of the peer.
    pub silence: Duration,
    /// From COMMIT to RUNNING, and in postcopy until the peer takes the guest.
    pub running: Duration,
}

impl Default for AnswerTimeouts {
    /// 30 s each.
    fn default() -> Self {
        let time = Duration::from_secs(30);
        Self { ready: time, silence: time, running: time }
    }
}

/// What the source may do, and how long it may take.
#[derive(Clone, Debug)]
pub struct SourceConfig {
    /// Longest permitted downtime.
    pub downtime_limit: Duration,
    /// Part of it that does not depend on the dirty pages: the last sync, the digest, the peer's answers.
    pub fixed_downtime: Duration,
    /// Approximate number of bytes of device state that are sent while the guest is paused.
    pub state_bytes: u64,
    /// Rate of the link while the guest is paused; `None`: the measured rate.
    pub switchover_rate: Option<Rate>,
    /// When the guest must have been paused, counted from the start, and what happens to the migration otherwise.
    pub timeout: Option<(Duration, OnTimeout)>,
    /// The peer is told that the guest may run there before all its memory has arrived; the rule gives the time.
    /// `None`: it never does.
    pub postcopy: Option<PostcopyRule>,
    /// Requested pages have a connection of their own, which is made at this time. `None`: they go with the others.
    pub urgent: Option<UrgentChannel>,
    /// A round after the first that lasts longer is cut, so that the guest's writes are seen.
    pub longest_round: Option<Duration>,
    /// The paused guest waits for its embedder before its last pages are sent.
    pub holds: bool,
    /// Bytes of one target page.
    pub page_bytes: u64,
    /// Longest time for which pages are sent before it is decided again what follows.
    pub slice: Duration,
    /// How long the peer's answers are waited for.
    pub answers: AnswerTimeouts,
    /// When the guest is paused.
    pub switchover: Switchover,
    /// How ownership passes.
    pub handover: Handover,
    /// Whether a digest of RAM and state is compared before READY.
    pub digest: bool,
    /// Whether memory is compared with the sent pages after the guest has started at the peer.
    pub memory_check: bool,
}

impl SourceConfig {
    /// 300 ms of downtime, slices of 50 ms, no digest.
    pub fn new(page_bytes: u64, handover: Handover) -> Self {
        Self {
            downtime_limit: Duration::from_millis(300),
            fixed_downtime: Duration::ZERO,
            state_bytes: 0,
            switchover_rate: None,
            timeout: None,
            postcopy: None,
            urgent: None,
            longest_round: None,
            holds: false,
            page_bytes,
            slice: Duration::from_millis(50),
            answers: AnswerTimeouts::default(),
            switchover: Switchover::WhenItFits,
            handover,
            digest: false,
            memory_check: false,
        }
    }
}
