//! A source that has switched to postcopy, at a relay: the far end takes the guest, and pages are missing there.
//!
//! No guest runs here, so no thread waits for a page: pages are placed as in precopy, the far end's faults come as
//! requests, and the far end's answers to the package are passed back.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::DestinationEvent;
use crate::guest::Placer;
use crate::ram::{PageRun, PageSet};
use crate::stream::qemu::package::{PING_TAKEN, decode_package};
use crate::stream::qemu::return_path::Message;
use crate::sys::Stop;
use crate::transport::ChannelError;

use super::DestinationSession;
use super::receive::{no_blocks, out_of_turn};
use super::return_path::ReturnPathWriter;
use super::switch::Switch;
use crate::session::Error;

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
    placer: Arc<Placer>,
}

impl Switch {
    /// At a relay all that the source discarded must have come with its last page.
    ///
    /// # Errors
    /// It has not.
    pub(super) fn relayed_all(&mut self) -> Result<(), Error> {
        let Some(Relayed { owed, placer }) = self.relayed() else { return Ok(()) };
        let Some(page) = owed.runs().find_map(|run| placer.first_missing(run)) else { return Ok(()) };
        Err(never_came(placer, page))
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
    pub(super) fn relay_switch(&mut self, package: &[u8], owed: PageSet) -> Result<(), Error> {
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
        self.switch.relay(Relayed { owed: owed.clone(), placer });
        let switched = Switched { state, owed, waits, source };
        self.with_keepalive(|session| session.ingest.switched(switched))
    }

    /// What a step's failure means at a relay whose source has switched; `None` if nothing special.
    pub(super) fn relayed_loss(&self) -> Option<DestinationEvent> {
        self.ingest.is_taken().then_some(DestinationEvent::Lost)
    }
}
