//! Pages that come beside the stream: between a mark in it and the round's end, or on channels of their own.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::Ending;
use crate::error::{Chain, Remedy};
use crate::stream::qemu::blocks::BlockAnnouncement;
use crate::stream::qemu::incoming::{AnnouncedBlocks, Seen};
use crate::stream::qemu::section::Phase;
use crate::stream::{Corrupt, DecodeError};
use crate::sys::Stop;

use super::counts::{more_channels_there, no_channels_here};
use super::receive::out_of_turn;
use super::{DestinationSession, Incoming};
use crate::session::callback::quietly;
use crate::session::source::discards;
use crate::session::{Breakage, Error, ErrorKind};

/// How long the source may take to close its end of the connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

impl DestinationSession {
    /// The blocks are known: their memory is offered to the peer, and stays in place from here on.
    pub(super) fn prepare_rounds(&mut self, incoming: &Incoming) -> Result<(), Error> {
        let memory = Arc::clone(self.placing()?.memory());
        let Some(rounds) = self.source.rounds() else { return Ok(()) };
        if !self.control.forbid_discard(true) {
            return Err(discards());
        }
        let waits = rounds.waits_after_round();
        rounds.announce(&memory, &incoming.blocks)?;
        let placing = self.placing()?;
        if placing.is_watched() {
            if !waits {
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
        if self.breakage.is(Breakage::ScanBeforeFinish) && self.ram_phase == Some(Phase::End) {
            self.scan()?;
        }
        let Some(rounds) = self.source.rounds() else {
            return Err(out_of_turn("the mark of a round", "a stream that has none"));
        };
        let round = rounds.receive_round(&self.stop)?;
        self.zero_in_rounds += round.zero_bytes;
        let placing = self.placing()?;
        let page = placing.memory().table().page().bytes();
        placing.placer().count_zero(round.zero_bytes / page);
        round.touched.into_iter().for_each(|run| placing.written(run));
        self.figures.round_marked();
        // The setup round has no pages; those of the last one are looked for when the section ends, while the source
        // goes on with its device state.
        if self.ram_phase == Some(Phase::Part) { self.scan() } else { Ok(()) }
    }

    /// No page comes any more: what the last round brought is looked for.
    pub(super) fn last_scan(&mut self) -> Result<(), Error> {
        if self.breakage.is(Breakage::ScanBeforeFinish) { Ok(()) } else { self.scan() }
    }

    fn scan(&mut self) -> Result<(), Error> {
        match &mut self.placing {
            Some(placing) => placing.scan(&self.settings.spawner, &self.stop),
            None => Ok(()),
        }
    }

    /// There is memory now: the page channels may fill it.
    pub(super) fn begin_channels(&mut self, announced: &[BlockAnnouncement]) -> Result<(), Error> {
        let placer = Arc::clone(self.placing()?.placer());
        let page = placer.memory().table().page();
        let Some(channels) = self.source.channels() else { return Ok(()) };
        let blocks = AnnouncedBlocks::new(announced.to_vec())
            .map_err(|fault| Error::Decode(DecodeError::Corrupt(Corrupt { at: 0, fault })))?;
        Ok(channels.begin(placer, blocks, page)?)
    }

    /// The stream has reached a barrier: what came before it on any channel is in place when this returns, and
    /// nothing of what comes after it.
    pub(super) fn barrier(&mut self) -> Result<(), Error> {
        let Some(channels) = self.source.channels() else {
            return Err(no_channels_here());
        };
        if !self.breakage.is(Breakage::SkipBarrier) {
            channels.wait_barrier(&self.stop)?;
        }
        // A ramwire has told how many it has, and tells of each page.
        if !self.engine.is_native() {
            channels.check_packets().map_err(more_channels_there)?;
        }
        // Pressure is handed back before the channels go on.
        self.placing()?.between_reads()?;
        if let Some(channels) = self.source.channels() {
            channels.release();
        }
        Ok(())
    }

    /// The end of a section's records is a barrier of the page channels where no record is. Channels that we
    /// were not told of show in what has come when RAM ends.
    pub(super) fn records_ended(&mut self, seen: Seen) -> Result<(), Error> {
        let is_barrier = self.source.channels().is_some() && seen.barrier_in_start == Some(false);
        if is_barrier { self.barrier() } else { Ok(()) }
    }

    /// The guest runs here next: nobody else writes to its memory any more.
    pub(super) fn revoke_rounds(&mut self) {
        if let Some(channels) = self.source.channels() {
            channels.end();
        }
        if let Some(rounds) = self.source.rounds() {
            rounds.revoke();
        }
    }

    /// The connection ends: in good order if the guest runs here, else the peer is told.
    pub(super) fn close_rounds(&mut self, ending: Ending) {
        if let Some(channels) = self.source.channels() {
            channels.end();
        }
        let Some(rounds) = self.source.rounds() else { return };
        rounds.revoke();
        if ending == Ending::Running {
            let stop = Stop::never().within(CLOSE_TIMEOUT);
            if let Err(error) = rounds.part(&stop) {
                let error = Error::from(error);
                // A source that left first has what it needs.
                if error.kind() != ErrorKind::Channel {
                    tracing::warn!(error = %Chain(&error), "the guest runs here, but its connection did not end in good order");
                }
            }
        }
        quietly("allowing discards", || _ = self.control.forbid_discard(false));
    }
}
