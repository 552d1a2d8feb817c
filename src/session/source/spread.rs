//! Background pages of a postcopy on page channels, between two ramwires: requested pages then have the main connection
//! to themselves, or the one for urgent pages.
//!
//! # Orders that must hold
//!
//! No page leaves on a page channel before the peer serves faults: it would be placed and discarded afterwards. All pages
//! on them are placed before the end of the stream is read. The target pages of a host page go on one channel.

use crate::engine::Handover;
use crate::error::Remedy;
use crate::page::ZeroDetection;
use crate::ram::{PageBatch, RoundKind};
use crate::stream::qemu::ram::EOS_RECORD;
use crate::stream::qemu::section::encode_part;
use crate::transport::Offer;

use super::SourceSession;
use crate::session::{Breakage, Error};

/// Target pages of a batch on a page channel, about; a host page goes whole.
const SPREAD_PAGES: u64 = 128;

impl SourceSession {
    /// Missing pages that nobody waits for go on page channels.
    pub(super) fn spreads(&self) -> bool {
        self.settings.postcopy.is_some() && self.wire.link.page_channels() > 0
    }

    /// Only a ramwire takes missing pages on page channels.
    pub(super) fn refuse_spreading(&self, handover: Handover) -> Result<(), Error> {
        if handover == Handover::Native || !self.spreads() {
            return Ok(());
        }
        Err(Error::Config {
            what: "postcopy was asked for with page channels, and the destination is a QEMU".into(),
            remedy: Remedy::Advice(
                "leave the page channels out: a QEMU takes missing pages in the stream only",
            ),
        })
    }

    /// Whether a page channel has room; `None`: there is none.
    pub(super) fn room_on_channels(&mut self) -> Option<bool> {
        if self.breakage.is(Breakage::SpreadEarly) {
            self.missing.background.serves();
        }
        self.spreads().then(|| self.wire.link.has_room())
    }

    /// Gives some background pages to a page channel that has room.
    pub(super) fn spread(&mut self) -> Result<(), Error> {
        self.take_returned()?;
        let batch = self.next_spread()?;
        if batch.is_empty() {
            self.pages.done_with(batch);
            return Ok(());
        }
        let bytes = self.pages.bytes_of(batch.pages(), 0);
        match self.wire.link.offer(batch, &self.wire.stop)? {
            Offer::Taken(_) => {}
            Offer::Full(batch) | Offer::Declined(batch) => {
                self.pages.mark_unsent(&batch);
                self.pages.done_with(batch);
                return Ok(());
            }
        }
        self.missing.background.sent_aside(self.driver.clock.now(), bytes);
        Ok(())
    }

    /// Whole host pages. Zero ones are found by the channels' threads: a record of one on the main connection would
    /// take it out of its host page.
    fn next_spread(&mut self) -> Result<PageBatch, Error> {
        let detection = match self.settings.zero_detection {
            ZeroDetection::None => ZeroDetection::None,
            ZeroDetection::Legacy | ZeroDetection::Channels => ZeroDetection::Channels,
        };
        let mut batch = self.pages.fresh_batch();
        while batch.pages() < SPREAD_PAGES {
            let Some(run) = self.pages.next_run(SPREAD_PAGES - batch.pages()) else { break };
            let seen = self.classify_missing(run, detection, &mut batch);
            seen.inspect_err(|_| {
                self.pages.dirty.set_run(run);
                self.pages.mark_unsent(&batch);
            })?;
        }
        Ok(batch)
    }

    /// No page is left to be sent: the peer reads no further before it has placed those on the page channels.
    pub(super) fn gather_spread(&mut self) -> Result<(), Error> {
        if !self.spreads() || self.breakage.is(Breakage::SkipLastBarrier) {
            return Ok(());
        }
        let mut head = Vec::new();
        encode_part(self.settings.ram_section, &mut head);
        self.wire.send(&head)?;
        self.wire.link.close_round(RoundKind::Live, &self.wire.stop)?;
        self.take_returned()?;
        let mut tail = EOS_RECORD.to_vec();
        self.settings.framing.encode_footer(self.settings.ram_section, &mut tail);
        self.figures.channel_bytes(self.wire.channel_bytes());
        Ok(self.wire.send(&tail)?)
    }
}
