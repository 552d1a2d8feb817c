//! Pages that arrive outside the stream: between a mark in it and the round's end, or on channels of their own.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::Ending;
use crate::error::{Chain, Remedy};
use crate::stream::qemu::blocks::BlockAnnouncement;
use crate::stream::qemu::incoming::{AnnouncedBlocks, Seen};
use crate::stream::{Corrupt, DecodeError};
use crate::sys::Stop;

use super::DestinationSession;
use super::counts::no_channels_here;
use super::receive::out_of_turn;
use crate::session::callback::quietly;
use crate::session::source::discards;
use crate::session::{Breakage, Error, ErrorKind};

/// How long the source may take to close its end of the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

impl DestinationSession {
    /// The blocks are known, and memory for them exists: pages may arrive. Memory that is registered for the peer stays
    /// in place from here on.
    pub(super) fn announce(&mut self, announced: &[BlockAnnouncement]) -> Result<(), Error> {
        let able = self.wire.link.abilities();
        if able.has_rounds && !self.guest.control.forbid_discard(true) {
            return Err(discards());
        }
        let blocks = AnnouncedBlocks::new(announced.to_vec())
            .map_err(|fault| Error::Decode(DecodeError::Corrupt(Corrupt { at: 0, fault })))?;
        let placer = Arc::clone(self.ingest.placing()?.placer());
        self.wire.link.announce(&placer, &blocks)?;
        let placing = self.ingest.placing()?;
        if able.has_rounds && placing.is_watched() {
            if !able.waits_after_round {
                return Err(Error::Config {
                    what: "the source may write while a round's pages are looked for".into(),
                    remedy: Remedy::Advice("accept it with RdmaOptions::wait_after_round"),
                });
            }
            placing.begin_scans();
        }
        Ok(())
    }

    /// The parser met the mark.
    pub(super) fn receive_round(&mut self) -> Result<(), Error> {
        if self.breakage.is(Breakage::ScanBeforeFinish) && self.ingest.sections().is_last_round() {
            self.scan()?;
        }
        if !self.wire.link.abilities().has_rounds {
            return Err(out_of_turn("the mark of a round", "a stream that has none"));
        }
        let round = loop {
            let pause = self.look_interval();
            match self.wire.link.receive_round(&self.wire.stop, pause)? {
                Some(round) => break round,
                None => self.has_come_again()?,
            }
        };
        self.reported.zero_in_rounds += round.zero_bytes;
        let placing = self.ingest.placing()?;
        let page = placing.memory().table().page().bytes();
        placing.placer().count_zero(round.zero_bytes / page);
        round.touched.into_iter().for_each(|run| placing.written(run));
        self.figures.round_marked();
        // The setup round has no pages. Those of the last round are scanned when the section ends, while the source
        // continues with its device state.
        if self.ingest.sections().pages_follow() { self.scan() } else { Ok(()) }
    }

    /// No more pages follow: scans for those of the last round.
    pub(super) fn last_scan(&mut self) -> Result<(), Error> {
        if self.breakage.is(Breakage::ScanBeforeFinish) { Ok(()) } else { self.scan() }
    }

    fn scan(&mut self) -> Result<(), Error> {
        self.ingest.scan(&self.settings.spawner, &self.wire.stop)
    }

    /// The stream has reached a barrier: when this returns, all earlier pages of any channel are placed, and no later
    /// ones.
    pub(super) fn barrier(&mut self) -> Result<(), Error> {
        if self.wire.link.abilities().page_channels == 0 {
            return Err(no_channels_here());
        }
        if (self.switch.is_running() || self.switch.relayed().is_some()) && !self.reported.spread {
            return Err(out_of_turn("a barrier of page channels", "waiting for missing pages"));
        }
        if !self.breakage.is(Breakage::SkipBarrier) {
            // A channel that does not reach the barrier is one of the known channels: this is no sign of further ones.
            self.wait_or_look(|link, stop| link.barrier(stop))?;
        }
        self.check_packets()?;
        self.reported.at_barrier = self.wire.link.placed_pages();
        // Pressure is passed to the source before the channels continue.
        self.ingest.placing()?.between_reads()?;
        self.wire.link.release();
        Ok(())
    }

    /// The end of a section's records is a barrier of the page channels for senders without a barrier record. Unknown
    /// further channels are detected from the received packets when RAM ends.
    pub(super) fn records_ended(&mut self, seen: Seen) -> Result<(), Error> {
        // After a switch to postcopy such a sender's pages come in the stream only, and its sections end for themselves.
        let is_barrier = self.wire.link.abilities().page_channels > 0
            && seen.barrier_in_start == Some(false)
            && !self.switch.is_running()
            && self.switch.relayed().is_none();
        if is_barrier { self.barrier() } else { Ok(()) }
    }

    /// The connection ends: in an orderly way if the guest runs here, otherwise the peer receives an error.
    pub(super) fn close_link(&mut self, ending: Ending) {
        self.wire.link.revoke();
        if ending == Ending::Running {
            let stop = Stop::never().within(CLOSE_TIMEOUT);
            if let Err(error) = self.wire.link.close(&stop) {
                let error = Error::from(error);
                // A source that disconnected first has what it needs.
                if error.kind() != ErrorKind::Channel {
                    tracing::warn!(error = %Chain(&error), "the guest runs here, but its connection did not end in good order");
                }
            }
        }
        if self.wire.link.abilities().has_rounds {
            quietly("allowing discards", || _ = self.guest.control.forbid_discard(false));
        }
    }
}
