//! The connection for urgent pages (QEMU: postcopy-preempt): there, requested pages do not wait for other pages.
//!
//! It carries records of pages without a section around them, with a current block of its own. A source towards a
//! machine up to 7.2 writes a mark after the last one.

use std::sync::Arc;

use crate::engine::{SourceEvent, UrgentChannel};
use crate::guest::GuestMemory;
use crate::ram::{PageBatch, PageRun};
use crate::session::config::SourceSettings;
use crate::session::{Breakage, Error, Peer};
use crate::stream::qemu::ram::EOS_RECORD;
use crate::stream::qemu::style::PreemptStyle;
use crate::sys::{SendPart, Stop};
use crate::transport::{ByteSink, ChannelError, InlinePages, MoveError, OpenError};

use super::SourceSession;
use super::filling::{BACKGROUND_PAGES, Missing};

/// The connection.
pub(super) struct Urgent {
    sink: Box<dyn ByteSink>,
    pages: InlinePages,
}

impl Urgent {
    fn new(sink: Box<dyn ByteSink>, memory: Arc<dyn GuestMemory>) -> Self {
        Self { sink, pages: InlinePages::new(memory) }
    }

    fn write(&mut self, batch: &PageBatch, stop: &Stop) -> Result<(), MoveError> {
        self.pages.write(batch, &mut *self.sink, stop)?;
        Ok(self.sink.flush(stop)?)
    }

    /// Bytes that were sent.
    pub(super) fn position(&self) -> u64 {
        self.sink.position()
    }
}

/// When the connection is opened, if one is configured. A peer that answers before it is open is not a QEMU 7.2: so
/// only a peer that is known to be one gets it early.
pub(super) fn time_of(settings: &SourceSettings) -> Option<UrgentChannel> {
    let asked = settings.postcopy.as_ref().is_some_and(|postcopy| postcopy.preempt);
    let style = settings.style.filter(|_| settings.peer != Some(Peer::Ramwire));
    asked.then(|| match style.map(|style| style.preempt) {
        Some(PreemptStyle::Early) => UrgentChannel::Early,
        Some(PreemptStyle::Late) | None => UrgentChannel::Late,
    })
}

impl SourceSession {
    /// Makes the connection.
    pub(super) fn open_urgent(&mut self) -> Result<SourceEvent, Error> {
        if self.breakage.is(Breakage::SkipUrgentAgain) && self.driver.engine.is_recovering() {
            return Ok(SourceEvent::Done);
        }
        let stop = self.wire.stop.within(self.settings.stall_timeout);
        let sink = match self.missing.recovery.connect(None, &stop) {
            Ok(connection) => connection.sink,
            Err(OpenError::Channel(error @ ChannelError::Stopped { .. })) => return Err(error.into()),
            Err(source) => return Err(Error::NoUrgentChannel { source }),
        };
        self.wire.urgent = Some(Urgent::new(sink, Arc::clone(&self.guest.memory)));
        Ok(SourceEvent::Done)
    }

    /// Sends requested pages first; false if there is nothing to send here. A partly sent host page continues where it
    /// began, and immediately, however often it is requested.
    pub(super) fn send_requested(&mut self) -> Result<bool, Error> {
        if self.wire.urgent.is_none() {
            return Ok(false);
        }
        let Some(run) = self.pages.next_requested(BACKGROUND_PAGES) else { return Ok(false) };
        if self.missing.has_begun(run) && !self.breakage.is(Breakage::SplitHostPage) {
            self.pages.dirty.set_run(run);
            self.missing.rest_is_asked = true;
            return Ok(false);
        }
        let mut batch = self.pages.fresh_batch();
        let detection = self.settings.zero_detection.with(false);
        if let Err(error) = self.classify_missing(run, detection, &mut batch) {
            self.pages.dirty.set_run(run);
            self.pages.mark_unsent(&batch);
            return Err(error);
        }
        let Some(urgent) = &mut self.wire.urgent else { return Ok(false) };
        if let Err(error) = urgent.write(&batch, &self.wire.stop) {
            self.pages.mark_unsent(&batch);
            return Err(error.into());
        }
        self.missing.urgent_pages += batch.pages();
        self.figures.counted(&batch);
        self.pages.done_with(batch);
        Ok(true)
    }

    /// The main connection has sent its last page: this one has, too.
    pub(super) fn end_urgent(&mut self) -> Result<(), Error> {
        let ends = self.driver.engine.urgent() == Some(UrgentChannel::Early);
        let Some(urgent) = &mut self.wire.urgent else { return Ok(()) };
        if ends && !self.breakage.is(Breakage::SkipUrgentEnd) {
            urgent.sink.send(&[SendPart::Own(&EOS_RECORD)], &self.wire.stop)?;
            urgent.sink.flush(&self.wire.stop)?;
        }
        urgent.sink.tolerate_outage(self.settings.finish_timeout.saturating_mul(2));
        Ok(())
    }
}

impl Missing {
    /// True if `run` is in the partly sent host page.
    fn has_begun(&self, run: PageRun) -> bool {
        let begun =
            |rest: PageRun| rest.block == run.block && rest.first < run.end() && run.first < rest.end();
        self.rest.is_some_and(begun)
    }
}
