//! A relay: a destination whose received pages are the dirty source of a source.
//!
//! ```text
//! upstream guest --stream--> destination session --pages--> memory --pages--> source session --stream--> far end
//!                               marks what came  ----------> sync takes it
//! ```
//!
//! The guest continues at its source until the source switches over by itself. Then the relay sends the remaining pages
//! and the device state, and passes back the far end's answer.
//!
//! The arrival of pages by RDMA is not visible; they are found by their content when a round is over (`scan`).
//!
//! # Required order
//!
//! The relay requests the guest from the upstream (READY) only after the far end is ready to take it over, and sends
//! `complete` only after the far end has reported it. The bytes of a page are placed before it is marked, and the mark
//! is taken before the bytes are read again.

mod content_scan;
#[cfg(test)]
mod doubt_tests;
mod ends;
pub(super) mod forward;
mod guard;
#[cfg(test)]
mod handover_tests;
pub(super) mod hub;
pub(super) mod owed;
mod postcopy;
#[cfg(test)]
mod postcopy_tests;
#[cfg(test)]
mod preempt_tests;
#[cfg(test)]
mod session_tests;
mod source_side;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::bounded;

use crate::engine::{Ending, RelayEnding, RelayEvent};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestMemory, MappedGuest};
use crate::observe::SharedStatistics;
use crate::ram::RamBlock;
use crate::sys::{CancelToken, Lock as _, Mapping, duplicate, memory_room};
use crate::units::PageSize;

use crate::session::destination::{
    DestinationGuest, DestinationReport, DestinationSession, Incoming, MemoryProvider, NextConnection,
};
use crate::session::handle::CancelReply;
use crate::session::source::{Reconnect, SourceReport};
use crate::session::{
    Breakage, Control, DestinationConnection, DestinationSettings, Error, SourceConnection, SourceSettings,
};
pub(super) use content_scan::ContentScan;
pub use content_scan::ScanReport;
pub(super) use owed::Came;

use ends::Middle;
pub use guard::{Guard, Held};
use hub::{Hub, Parts};
use source_side::{NotTaken, RelaySink, SourceSide};

/// Opens the connection to the far end once the guest's memory exists.
pub type ConnectFn = dyn FnOnce(Arc<dyn GuestMemory>) -> Result<SourceConnection, Error> + Send;

/// Notices for an operator while a relay runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The source opened no return path: it can't receive a report whether its guest arrived.
    NoReturnPath,
    /// The far end received the guest and does not answer. The source receives nothing, since either answer may let the
    /// guest run twice. The relay keeps listening to the far end; [`RelayControl::far_end_is_dead`] decides.
    InDoubt {
        /// What happened.
        why: String,
        /// The source has switched to postcopy: what the guest misses at the far end is only at the source, which must
        /// not be ended, even if the guest runs at the far end.
        switched: bool,
        /// The source waits for the outcome on its connection. Otherwise it has no return path, or is a file, and nothing
        /// can be told to it.
        source_waits: bool,
    },
    /// The guest is handed over and a [`Guard`] can't hold the source's connection: if this process dies in doubt, the
    /// source may resume the guest.
    NotGuarded,
}

/// Called with a [`Notice`] immediately, on a thread of its own.
pub type NoticeFn = dyn Fn(&Notice) + Send + Sync;

/// How a relay ended.
#[derive(Debug)]
#[non_exhaustive]
pub struct RelayReport {
    /// Where the guest is.
    pub ending: RelayEnding,
    /// The side towards the guest's source.
    pub received: DestinationReport,
    /// The side towards the far end; `None` if the relay ended before it began.
    pub sent: Option<SourceReport>,
    /// When the first page was sent on the far end's connection, since the relay began.
    pub first_page_sent: Option<Duration>,
    /// When the last page of the guest's first round had arrived, since the relay began.
    pub ram_complete: Option<Duration>,
    /// The source had switched to postcopy: of what is missing at the far end, its newest pages are only at the source.
    pub switched: bool,
    /// The guest's state, to be kept if neither side has it for certain. `None` after a switch to postcopy: pages that
    /// the source has discarded are older here, or missing.
    pub kept: Option<Kept>,
}

/// RAM and device state that a relay holds.
pub struct Kept {
    /// What the source announced.
    pub incoming: Incoming,
    /// The pages.
    pub memory: Arc<dyn GuestMemory>,
    /// The device state, if it has arrived.
    pub state: Option<Vec<u8>>,
}

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept").field("incoming", &self.incoming).finish_non_exhaustive()
    }
}

/// Decides about a relay while it runs. Clones belong to the same relay.
#[derive(Clone, Default)]
pub struct RelayControl(Arc<Hub>);

impl std::fmt::Debug for RelayControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RelayControl").finish_non_exhaustive()
    }
}

impl RelayControl {
    /// Requests the end. Accepted until the guest was requested from the source: the guest then certainly stays there,
    /// even if this process ends immediately.
    pub fn cancel(&self) -> CancelReply {
        self.0.cancel()
    }

    /// Changes the side towards the far end while it runs: its bandwidth and its cache of sent pages. `None` before the
    /// source has announced its guest. The guest runs at its own source, which alone throttles it and decides when to
    /// pause it.
    pub fn outgoing(&self) -> Option<Control> {
        self.0.outgoing()
    }

    /// True while it is unknown where the guest runs.
    pub fn is_in_doubt(&self) -> bool {
        self.0.lock().engine.is_in_doubt()
    }

    /// True if the source waits for the outcome on its connection; known once it has given the guest to the relay.
    pub fn source_waits(&self) -> bool {
        self.0.lock().engine.source_waits()
    }

    /// True once the source has switched to postcopy.
    pub fn has_switched(&self) -> bool {
        self.0.lock().engine.has_switched()
    }

    /// How it ended, or how it would end now.
    pub fn ending(&self) -> RelayEnding {
        self.0.lock().engine.ending()
    }

    /// True from the moment at which the far end may own the guest, until it is known where the guest is.
    pub fn is_given_away(&self) -> bool {
        self.0.lock().engine.is_given_away()
    }

    /// In doubt: the caller has confirmed that the guest does not run at the far end, and never will. The source
    /// receives a failure, and resumes the guest. False, and without effect, if there is no doubt.
    pub fn far_end_is_dead(&self) -> bool {
        let in_doubt = self.is_in_doubt();
        self.0.post(RelayEvent::NotThere);
        in_doubt
    }
}

/// Connections on which pages go that a thread waits for, after a switch to postcopy (QEMU: postcopy-preempt at both
/// ends).
pub struct UrgentConnections {
    /// From the guest's source: its second connection, and whatever else connects. Called until the migration has ended.
    pub from_source: Box<dyn NextConnection>,
    /// To the far end.
    pub to_far_end: Box<dyn Reconnect>,
}

/// A relay before it runs.
pub struct Relay {
    /// To the guest's own source.
    pub connection: DestinationConnection,
    /// Opens the connection to the far end.
    pub connect: Box<ConnectFn>,
    /// Settings for the side towards the upstream.
    ///
    /// [`postcopy`](DestinationSettings::postcopy) allows the source to switch; the far end must allow it as well. The
    /// guest then runs there, so nothing here needs a userfaultfd. With TLS on either side such a source is refused.
    pub incoming: DestinationSettings,
    /// Settings for the far side; completed with the upstream's announcements.
    pub outgoing: SourceSettings,
    /// A second connection of the source came behind the first, on which it would send urgent pages (QEMU 7.2:
    /// postcopy-preempt), and `urgent` is not set: a source that may switch is refused then.
    pub urgent_came: bool,
    /// Connections for urgent pages, on both sides: the far end must expect one (QEMU: postcopy-preempt). A source without
    /// one is taken as well: its urgent pages then come with the others. `None`: neither side has one.
    pub urgent: Option<UrgentConnections>,
    /// Request huge pages for the guest's RAM ([`Mapping::advise_huge_pages`]).
    pub huge_pages: bool,
    /// Ends the relay before the guest is requested; the guest then stays at its source.
    pub cancel: CancelToken,
    /// Decides about it while it runs.
    pub control: RelayControl,
    /// Holds the source's connection while the guest is handed over. Without it, the death of this process in doubt may
    /// let the guest run twice.
    pub guard: Option<Box<dyn Guard>>,
    /// Called with notices for an operator.
    pub notice: Arc<NoticeFn>,
    /// The far side's figures while it runs.
    pub statistics: SharedStatistics,
}

impl Relay {
    /// Runs it to its end.
    pub fn run(self) -> RelayReport {
        run(self, Breakage::None)
    }
}

pub(super) fn run(relay: Relay, breakage: Breakage) -> RelayReport {
    let Relay {
        mut connection,
        connect,
        incoming,
        outgoing,
        urgent_came,
        urgent,
        huge_pages,
        cancel,
        control,
        guard,
        notice,
        statistics,
    } = relay;
    let (urgent_source, urgent) = match urgent {
        Some(UrgentConnections { from_source, to_far_end }) => (Some(from_source), Some(to_far_end)),
        None => (None, None),
    };
    let hub = control.0;
    let stream = connection.link.stream();
    hub.begin(Parts {
        downtime_limit: outgoing.downtime_limit,
        guard,
        cancel: cancel.clone(),
        notice: Arc::clone(&notice),
        spawner: outgoing.spawner.clone(),
        // If no descriptor is left the relay continues, and reports it when the guest is handed over.
        source: stream.descriptor().and_then(|descriptor| duplicate(&descriptor).ok()),
        source_is_encrypted: stream.is_encrypted(),
    });
    let (give, far_end) = bounded(1);
    let began = Instant::now();
    let (made, source_waits) = Default::default();
    let memory = RelayMemory { huge_pages, hub: Arc::clone(&hub), made, source_waits };
    let held = Arc::clone(&memory.made);
    let (silenced, waits) = (Arc::default(), Arc::clone(&memory.source_waits));
    connection.back = connection.back.map(|sink| RelaySink::over(sink, &silenced));
    let side = Box::new(SourceSide {
        hub: Arc::clone(&hub),
        cancel: cancel.clone(),
        silenced: Arc::clone(&silenced),
        waits,
    });
    let guest = DestinationGuest { memory: Box::new(memory), control: side };
    let mut session = DestinationSession::new(guest, connection, incoming).with_cancel(cancel.clone());
    let ram_complete = Arc::default();
    let middle = Middle {
        hub: Arc::clone(&hub),
        connect: Some(connect),
        outgoing: Some(outgoing),
        give: Some(give),
        cancel,
        notice,
        came: session.statistics(),
        left: statistics,
        began,
        ram_complete: Arc::clone(&ram_complete),
        forwarded: None,
        meter: None,
        urgent_came,
        urgent,
        silenced: Arc::clone(&silenced),
    };
    session = session.with_incoming_observer(Box::new(middle));
    if let Some(next) = urgent_source {
        session = session.with_urgent_connection(next);
    }
    session.break_order(breakage);
    let mut received = session.run();
    received.error = received.error.map(NotTaken::told);
    if received.ending == Ending::Discarded {
        hub.post(RelayEvent::SourceKept);
    }
    // In any case the far side must not wait for this side any more.
    hub.post(RelayEvent::SourceGone);
    hub.post(RelayEvent::Told);
    let report = far_end.recv().ok();
    let first_page_sent = report.as_ref().and_then(|report| report.first_page_sent);
    let (sent, delay) = match report {
        Some(far) => (Some(far.report), far.began.saturating_duration_since(began)),
        None => (None, Duration::ZERO),
    };
    let (ending, switched) = {
        let inner = hub.lock();
        (inner.engine.ending(), inner.engine.has_switched())
    };
    let whole = held.locked().take().filter(|_| !switched);
    let kept = whole.zip(received.incoming.clone()).map(|(memory, incoming)| Kept {
        incoming,
        memory,
        state: hub.lock().device_state.take(),
    });
    let ram_complete = *ram_complete.locked();
    RelayReport {
        ending,
        switched,
        received,
        first_page_sent: first_page_sent.map(|time| time + delay),
        ram_complete,
        sent,
        kept,
    }
}

/// Anonymous memory for any announced block.
struct RelayMemory {
    made: Arc<Mutex<Option<Arc<dyn GuestMemory>>>>,
    huge_pages: bool,
    hub: Arc<Hub>,
    /// The source waits for the outcome of its guest.
    source_waits: Arc<AtomicBool>,
}

impl MemoryProvider for RelayMemory {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        if incoming.gives_unasked {
            self.hub.post(RelayEvent::GivesUnasked);
        }
        let page = incoming.configuration.page_size.unwrap_or(PageSize::SIZE_4K);
        let ram: u64 = incoming.blocks.iter().map(|block| block.used_length).sum();
        if let Some(room) = memory_room().filter(|room| room.bytes < ram) {
            let (needed, there) = (ram >> 20, room.bytes >> 20);
            return Err(Error::Config {
                what: format!("the guest has {needed} MiB of RAM, and {there} MiB are free {}", room.bound),
                remedy: Remedy::Advice("a relay holds all of the guest's RAM; run it where there is room"),
            });
        }
        let mut builder = MappedGuest::builder(page);
        for block in &incoming.blocks {
            let mapping = Mapping::private(block.used_length, self.huge_pages);
            let mapping = mapping.map_err(|error| Error::Config {
                what: Chain(&error).to_string(),
                remedy: Remedy::Advice("a relay holds all of the guest's RAM; run it where there is room"),
            })?;
            builder = builder.mapping(block.clone(), &mapping);
        }
        let memory: Arc<dyn GuestMemory> = Arc::new(builder.build()?);
        *self.made.locked() = Some(Arc::clone(&memory));
        Ok(memory)
    }

    /// Mapped for this guest.
    fn is_zeroed(&self, _block: &RamBlock) -> bool {
        true
    }

    fn arrived(&mut self, incoming: &Incoming, native: bool) {
        self.source_waits.store(incoming.has_return_path, Ordering::Release);
        self.hub.source_is(native);
    }
}
