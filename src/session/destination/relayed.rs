//! A source that has switched to postcopy, at a relay: the far end takes the guest, and pages are missing there.
//!
//! No guest runs here, so no thread waits for a page: pages are placed as in precopy, the far end's faults come as
//! requests, and the far end's answers to the package are passed back.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::engine::DestinationEvent;
use crate::guest::Placer;
use crate::ram::{PageRun, PageSet};
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::stream::qemu::package::{PING_TAKEN, decode_package};
use crate::stream::qemu::return_path::Message;
use crate::sys::{CancelToken, Lock as _, Stop};
use crate::transport::ChannelError;

use super::DestinationSession;
use super::postcopy::await_pages;
use super::preempt::{Preempt, UrgentPages};
use super::receive::{no_blocks, out_of_turn};
use super::return_path::ReturnPathWriter;
use super::switch::Switch;
use crate::session::Error;

/// How long a relay waits for its source's connection for urgent pages, which is made before the package is sent.
const URGENT_TIME: Duration = Duration::from_millis(100);

/// A source's switch to postcopy, for the far end.
pub(crate) struct Switched {
    /// The device state, as a stream of precopy ends with it.
    pub(crate) state: Vec<u8>,
    /// Pages that the source has discarded, and sends again.
    pub(crate) owed: PageSet,
    /// It waits for the answer that its guest was taken, and may take it back until then.
    pub(crate) waits: bool,
    /// `None`: nobody listens.
    pub(crate) source: Option<ToSource>,
    /// Duplicates of the connections of which one is the source's for urgent pages.
    pub(crate) urgent: Vec<OwnedFd>,
}

/// Messages to a source that has switched.
pub(crate) struct ToSource {
    back: ReturnPathWriter,
    placer: Arc<Placer>,
    /// The PINGs of its package.
    pings: Vec<u32>,
    /// Longest time for one message.
    send_timeout: Duration,
}

impl ToSource {
    /// Requests host pages.
    pub(crate) fn ask(&self, page: PageRun) -> Result<(), Error> {
        let landing = self.placer.memory().table().admit_run(page);
        let landing = landing.map_err(|error| out_of_turn(&error.to_string(), "postcopy"))?;
        Ok(self.back.ask(&self.placer, landing, &Stop::never().within(self.send_timeout))?)
    }

    /// The far end has loaded the device state and takes the guest.
    pub(crate) fn taken(&self) -> Result<(), ChannelError> {
        let stop = Stop::never().within(self.send_timeout);
        self.pings.iter().try_for_each(|value| self.back.message(Message::Pong(*value), &stop))
    }

    /// True if its host has all that was sent to it.
    pub(crate) fn has_heard(&self) -> bool {
        self.back.unacknowledged() == 0
    }
}

/// Pages that come again at a relay.
pub(super) struct Relayed {
    owed: PageSet,
    /// Urgent ones come on a connection of their own, if the source has made one.
    preempt: Preempt,
    urgent: UrgentPages,
    lost: Arc<Lost>,
    /// Longest wait for the last pages.
    patience: Duration,
}

/// The loss of the connection for urgent pages.
#[derive(Default)]
struct Lost {
    why: Mutex<Option<Error>>,
    /// All pages have come: it is none any more.
    all_came: AtomicBool,
}

impl Relayed {
    fn new(
        owed: PageSet,
        preempt: Preempt,
        placer: Arc<Placer>,
        ends: CancelToken,
        patience: Duration,
    ) -> Self {
        let lost = Arc::<Lost>::default();
        let (loses, stop) = (Arc::clone(&lost), Stop::on(&ends));
        let lose = move |error: Option<Error>| {
            let is_loss = error.is_some();
            if let Some(error) = error {
                loses.why.locked().get_or_insert(error);
            }
            if !(is_loss && loses.all_came.load(Ordering::Acquire)) {
                ends.cancel();
            }
        };
        let urgent = UrgentPages { placer, stop, lose: Arc::new(lose) };
        Self { owed, preempt, urgent, lost, patience }
    }

    /// Why the connection for urgent pages was lost, if it was.
    pub(super) fn take_loss(&self) -> Option<Error> {
        self.lost.why.locked().take()
    }

    /// The migration has ended, `well`: the source may still write its last mark. Returns the numbers of target pages and
    /// bytes that came on the connection for urgent pages.
    pub(super) fn finish(&mut self, well: bool) -> (u64, u64) {
        if !well {
            (self.urgent.lose)(None);
        }
        self.preempt.finish(&self.urgent)
    }
}

impl Drop for Relayed {
    fn drop(&mut self) {
        (self.urgent.lose)(None);
        self.preempt.end();
    }
}

impl Switch {
    /// At a relay all that the source discarded must come, the last of it on the connection for urgent pages.
    ///
    /// # Errors
    /// It does not.
    pub(super) fn relayed_all(&mut self, stop: &Stop) -> Result<(), Error> {
        let Some(Relayed { owed, preempt, urgent, lost, patience }) = self.relayed() else { return Ok(()) };
        await_pages(owed, &urgent.placer, preempt, &stop.within(*patience))?;
        lost.all_came.store(true, Ordering::Release);
        Ok(())
    }
}

/// The source ends although it owes a page.
pub(super) fn never_came(placer: &Placer, page: PageRun) -> Error {
    let name = placer.memory().table().get(page.block).map_or("", |block| block.name.as_str());
    let at = page.first.0 * placer.page_bytes();
    let what = format!("the end of RAM, though the page at {at:#x} of RAM block {name} was discarded");
    out_of_turn(&what, "waiting for missing pages")
}

impl DestinationSession {
    /// The package is whole: the far end is given the guest. Pages are read on from here.
    ///
    /// # Errors
    /// The far end did not get it: the source is told.
    pub(super) fn relay_switch(
        &mut self,
        package: &[u8],
        owed: PageSet,
        blocks: &AnnouncedBlocks,
    ) -> Result<(), Error> {
        let decoded = decode_package(package)?;
        let placing = self.ingest.placed().ok_or_else(|| no_blocks("a package"))?;
        let placer = Arc::clone(placing.placer());
        let (pings, send_timeout) = (decoded.pings, self.settings.stall_timeout);
        let waits = pings.contains(&PING_TAKEN);
        let back = self.wire.back.clone();
        let source = back.map(|back| ToSource { back, placer: Arc::clone(&placer), pings, send_timeout });
        let state = self.state_of_package(decoded.sections)?;
        if let Some(incoming) = self.ingest.incoming() {
            self.guest.memory.arrived(incoming, self.driver.engine.is_native());
        }
        let urgent = self.urgent_of_source();
        let spawner = self.settings.spawner.clone();
        let preempt = Preempt::new(blocks.clone(), self.switch.urgent().clone(), spawner);
        let mut relayed =
            Relayed::new(owed.clone(), preempt, placer, self.ingest.source_ends(), send_timeout);
        relayed.preempt.start(relayed.urgent.clone())?;
        self.switch.relay(relayed);
        let switched = Switched { state, owed, waits, source, urgent };
        self.with_keepalive(|session| session.ingest.switched(switched))
    }

    /// The source's connection for urgent pages, which it has made before its package, and silent ones of others.
    fn urgent_of_source(&self) -> Vec<OwnedFd> {
        let Some(mut connections) = self.switch.urgent().take() else { return Vec::new() };
        let held = connections.held(&Stop::never().within(URGENT_TIME));
        if held.is_empty() {
            tracing::warn!("the source has made no connection for urgent pages: they come behind the others");
        }
        self.switch.urgent().put(Some(connections));
        held
    }

    /// What a step's failure means at a relay whose source has switched; `None` if nothing special.
    pub(super) fn relayed_loss(&mut self) -> Option<DestinationEvent> {
        if self.ingest.has_moved() {
            // Without the last word the source may take its guest back, or wait for ever.
            self.driver.engine.all_pages_came();
            self.error = None;
        }
        self.ingest.is_taken().then_some(DestinationEvent::Lost)
    }
}
