//! Fingerprints at the source: made as pages are sent, reported after each round, compared with memory at the end.

use std::sync::Arc;
use std::time::Duration;

use crate::engine::{Handover, SourceEvent};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestError, GuestMemory, span_of};
use crate::ram::{Fingerprints, PageBatch, PageRun, PageSet, RoundKind, Verdict};
use crate::stream::native::{FINGERPRINTS_VERSION, Finding, MAX_FINGERPRINTS, Order, STATE_BLOCK};
use crate::stream::qemu::command::Command;
use crate::sys::Stop;
use crate::units::PageIndex;

use super::SourceSession;
use super::return_path::check_deadline;
use super::setup::ORDINARY_PING;
use crate::session::Error;
use crate::session::config::Verify;
use crate::session::digest::carried;
use crate::session::fingerprints::{MemoryCheck, compare_memory};

/// Bytes of fingerprints that are sent at once.
const SEND_BYTES: usize = 256 << 10;

/// Value of the PING after the fingerprints of a round whose pages were sent outside the stream: `RWF1`.
const COMPARED_PING: u32 = 0x5257_4631;

/// Fingerprints of the sent pages, and which of them were not sent to the destination yet.
#[derive(Default)]
pub(super) struct Prints {
    /// Once both ends have agreed.
    table: Option<Arc<Fingerprints>>,
    /// The link makes those of pages that are not known to be zero.
    by_link: bool,
    /// Pages of the round.
    round: PageSet,
    window: Vec<u8>,
    /// The destination has compared all fingerprints that it received.
    compared: bool,
    /// The result of the memory check at the end.
    pub(super) found: Option<MemoryCheck>,
}

impl Prints {
    /// These pages leave in this round.
    pub(super) fn sent(&mut self, run: PageRun) {
        if self.table.is_some() {
            self.round.add(run);
        }
    }

    /// Pages go in a stream from here on, which makes none.
    pub(super) fn over_stream(&mut self) {
        self.by_link = false;
    }

    /// The connection was replaced. What was not told yet is told of `held`, which the destination has, at the end of the next
    /// round; the others are sent again.
    pub(super) fn replaced(&mut self, held: &PageSet) {
        if self.table.is_some() {
            self.round = held.clone();
        }
    }

    /// A PONG has arrived.
    pub(super) fn answered(&mut self, value: u32) {
        self.compared |= value == COMPARED_PING;
    }

    /// Makes those of a batch that is about to leave. The dirty bits of its pages are cleared.
    pub(super) fn make(&mut self, guest: &dyn GuestMemory, batch: &PageBatch) -> Result<(), Error> {
        let Some(table) = &self.table else { return Ok(()) };
        let page = guest.table().page().bytes() as usize;
        self.window.resize(page, 0);
        for piece in batch.pieces() {
            match piece.verdict {
                Verdict::Zero => table.set_zero(piece.run),
                _ if self.by_link => {}
                _ => {
                    let span = span_of(guest, guest.table().admit_run(piece.run).map_err(GuestError::from)?)?;
                    for index in 0..piece.run.pages {
                        let Some(bytes) = span.part(index as usize * page, page) else { break };
                        bytes.copy_to(&mut self.window);
                        let at = PageIndex(piece.run.first.0 + index);
                        table.set(piece.run.block, at, table.of(&self.window));
                    }
                }
            }
        }
        Ok(())
    }
}

impl SourceSession {
    /// Both ends have agreed on everything: pages have fingerprints from here on, if they are to.
    pub(super) fn begin_fingerprints(&mut self) {
        if self.settings.verify != Verify::Fast {
            return;
        }
        let table = self.guest.memory.table();
        let prints = Arc::new(Fingerprints::new(table, self.settings.migration_id));
        self.pages.prints = Prints {
            by_link: self.wire.link.keep_fingerprints(&prints),
            round: PageSet::new(table),
            table: Some(prints),
            ..Prints::default()
        };
    }

    /// The round is closed: reports to the destination what was sent in it. Pages that the guest has written meanwhile
    /// may differ from their fingerprints; they are dirty, and will be reported again.
    pub(super) fn send_fingerprints(&mut self) -> Result<(), Error> {
        let Some(table) = self.pages.prints.table.clone() else { return Ok(()) };
        let empty = PageSet::new(self.guest.memory.table());
        let round = std::mem::replace(&mut self.pages.prints.round, empty);
        let (mut out, mut values) = (Vec::new(), Vec::new());
        for run in round.runs() {
            let mut first = run.first.0;
            while first < run.end().0 {
                let end = run.end().0.min(first + MAX_FINGERPRINTS as u64);
                values.clear();
                for page in first..end {
                    let value = table.get(run.block, PageIndex(page)).unwrap_or_default();
                    values.extend_from_slice(&value.to_be_bytes());
                }
                Command::Native(Order::Fingerprints { block: run.block.0, first, values: &values })
                    .encode(&mut out);
                first = end;
                if out.len() >= SEND_BYTES {
                    self.wire.send(&out)?;
                    out.clear();
                }
            }
        }
        if out.is_empty() { Ok(()) } else { Ok(self.wire.send(&out)?) }
    }

    /// The destination compares a round when it has placed all of it, and reads pages again that arrived by RDMA. The
    /// guest is not paused before that is done: it must not be a part of the downtime.
    pub(super) fn await_compared(&mut self, kind: RoundKind) -> Result<(), Error> {
        if self.pages.prints.table.is_none() || kind == RoundKind::Final {
            return Ok(());
        }
        self.pages.prints.compared = false;
        let mut ping = Vec::new();
        Command::Ping(COMPARED_PING).encode(&mut ping);
        self.wire.send(&ping)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        let after = self.settings.finish_timeout;
        match self.hear_compared(&self.wire.stop.within(after)) {
            // The destination's host has all that was sent, so the connection lives, and another one would be of no use.
            Err(error) if error.is_deadline() && self.wire.link.unacknowledged() == 0 => {
                Err(not_compared(after))
            }
            heard => heard,
        }
    }

    fn hear_compared(&mut self, stop: &Stop) -> Result<(), Error> {
        while !self.pages.prints.compared {
            let Some(back) = &mut self.wire.back else { return Ok(()) };
            let message = back.next(stop)?;
            self.take_message(message)?;
            check_deadline(stop)?;
        }
        Ok(())
    }

    /// Of the device state, and of the content of the stream other than it and RAM.
    pub(super) fn encode_state_fingerprints(&self, state: &[u8], out: &mut Vec<u8>) {
        let Some(table) = &self.pages.prints.table else { return };
        let settings = &self.settings;
        let configuration = (&settings.configuration, &settings.vmm_configuration[..]);
        let carried = carried(settings.framing, configuration, &settings.early_sections);
        let values = [table.of(&carried).to_be_bytes(), table.of(state).to_be_bytes()].concat();
        Command::Native(Order::Fingerprints { block: STATE_BLOCK, first: 0, values: &values }).encode(out);
    }

    /// The guest runs at the destination, and memory here no longer changes: does it hold what was sent of it? Whatever
    /// the result, the migration is complete.
    pub(super) fn check_memory(&mut self) -> Result<SourceEvent, Error> {
        let finding = match self.compare_all() {
            Ok(finding) => {
                let announced: Vec<_> =
                    self.guest.memory.table().blocks().iter().map(|block| block.name.clone()).collect();
                self.pages.prints.found =
                    Some(MemoryCheck::of(finding, self.guest.memory.table(), &announced));
                finding
            }
            Err(error) => {
                let why = Chain(&error).to_string();
                self.pages.prints.found = Some(MemoryCheck::NotMade { why });
                Finding::NotMade
            }
        };
        if let Some(found @ MemoryCheck::Differs { .. }) = &self.pages.prints.found {
            tracing::error!("{found}");
        }
        let mut order = Vec::new();
        Command::Native(Order::MemoryCheck(finding)).encode(&mut order);
        self.wire.stop = Stop::never().within(self.settings.finish_timeout);
        let told = self.wire.send(&order).and_then(|()| self.wire.link.sink().flush(&self.wire.stop));
        if let Err(error) = told {
            tracing::warn!(error = %Chain(&error), "the result of the memory check could not be sent to the \
                destination");
        }
        Ok(SourceEvent::Done)
    }

    fn compare_all(&mut self) -> Result<Finding, Error> {
        let Some(table) = self.pages.prints.table.clone() else { return Ok(Finding::NotMade) };
        let unsent = self.pages.skips.unsent().clone();
        let whole = self.settings.all_dirty_at_start;
        let (guest, spawner) = (Arc::clone(&self.guest.memory), self.settings.spawner.clone());
        compare_memory(&guest, &table, (unsent, whole), &spawner, || {
            // The destination waits for the result. If it is gone, the operator here gets the result nevertheless.
            let mut ping = Vec::new();
            Command::Ping(ORDINARY_PING).encode(&mut ping);
            self.wire.stop = Stop::never().within(self.settings.stall_timeout);
            let _ = self.wire.send(&ping).and_then(|()| self.wire.flush());
            Ok(())
        })
    }

    /// Fast was requested: the peer must support it.
    pub(super) fn agree_on_fingerprints(&self, agreed: bool, version: u16) -> Result<(), Error> {
        if self.settings.verify != Verify::Fast {
            return Ok(());
        }
        if !agreed || version < FINGERPRINTS_VERSION {
            return Err(no_fingerprints("the destination is an older ramwire"));
        }
        Ok(())
    }

    /// A requested check that a peer of this kind can't do.
    pub(super) fn refuse_verify(&self, handover: Handover, why: &str) -> Result<(), Error> {
        if handover == Handover::Native { Ok(()) } else { refuse_verify(self.settings.verify, why) }
    }
}

/// A requested check that a peer can't do.
pub(super) fn refuse_verify(verify: Verify, why: &str) -> Result<(), Error> {
    match verify {
        Verify::Off => Ok(()),
        Verify::Fast => Err(no_fingerprints(why)),
        Verify::Full => Err(no_digest(why)),
    }
}

fn no_fingerprints(why: &str) -> Error {
    Error::Config {
        what: format!(
            "fingerprints of pages were to be compared, and {why}: only two ramwires do, both of version {FINGERPRINTS_VERSION} or later"
        ),
        remedy: Remedy::Advice(
            "migrate to such a ramwire over a connection of both directions, or do not ask for verification",
        ),
    }
}

fn not_compared(after: Duration) -> Error {
    let what = "that it has compared the fingerprints of a round";
    Error::NoAnswer { what, after, remedy: Remedy::RaiseFinishTimeout }
}

fn no_digest(why: &str) -> Error {
    Error::Config {
        what: format!("a digest was asked for, and {why}: only two ramwires compare one"),
        remedy: Remedy::Advice(
            "migrate to a ramwire over a connection of both directions, or do not ask for the digest",
        ),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::session::source::peer::tests::sending;

    /// A destination that compares slowly is there: another connection to it would not make it faster.
    #[test]
    fn a_destination_that_does_not_compare_in_time_is_not_a_lost_one() {
        let (mut session, _far) = sending();
        session.settings_mut().verify = Verify::Fast;
        session.settings_mut().finish_timeout = Duration::from_millis(20);
        session.begin_fingerprints();
        assert!(session.driver.engine.may_recover(), "a loss is no end");
        session.await_compared(RoundKind::Final).unwrap();
        let error = session.await_compared(RoundKind::Live).unwrap_err();
        assert!(matches!(error, Error::NoAnswer { remedy: Remedy::RaiseFinishTimeout, .. }), "{error}");
        assert_eq!(session.keep(error), SourceEvent::Failed);
    }
}
