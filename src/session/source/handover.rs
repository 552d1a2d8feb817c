//! How a migration ends at the source: device state, digest, COMMIT.

use crate::engine::{Handover, SourceEvent};
use crate::guest::save_state;
use crate::ram::PageSet;
use crate::stream::native::{MAX_DIGESTS, Order, encode_state_head};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::section::Framing;
use crate::stream::qemu::state::sections_end;
use crate::stream::qemu::tail::without_devices;
use crate::sys::{SendPart, Stop};
use crate::transport::ChannelError;

use super::SourceSession;
use super::passing::Passed;
use super::return_path::ReturnPath;
use super::setup::{ORDINARY_PING, RAM_SECTION_ID};
use crate::session::digest::{Digest, carried};
use crate::session::{Breakage, Error};

/// What the source keeps of its guest while it gives it away.
#[derive(Default)]
pub(super) struct Departure {
    /// Paused here, and not resumed.
    pub(super) paused: bool,
    /// The device state, or the package with it. Towards a QEMU and in postcopy the part from `commit_at` on is COMMIT.
    pub(super) state: Vec<u8>,
    pub(super) commit_at: usize,
    /// Memory that goes as descriptors.
    pub(super) passed: Passed,
}

impl Departure {
    /// All but what commits.
    pub(super) fn uncommitted(&self) -> &[u8] {
        &self.state[..self.commit_at]
    }

    /// What commits.
    pub(super) fn committing(&self) -> &[u8] {
        &self.state[self.commit_at..]
    }
}

impl SourceSession {
    /// Everything about the device state but the byte that commits.
    pub(super) fn send_state(&mut self) -> Result<SourceEvent, Error> {
        self.check_layout()?;
        let saved = save_state(self.guest.control.as_mut());
        let mut state = saved.map_err(|source| Error::Control { what: "save its device state", source })?;
        if self.driver.engine.handover() == Handover::Native {
            self.send_native_state(&state)?;
            self.departure.state = state;
        } else {
            if state.is_empty() {
                // Only so does the stream have an end.
                state = without_devices(self.guest.memory.table().page().bytes());
            }
            // A QEMU starts the guest when it has read the byte that ends the sections: that byte is COMMIT.
            self.departure.commit_at = commit_at(&state, self.settings.framing);
            self.departure.state = state;
            self.wire.send(self.departure.uncommitted())?;
        }
        self.wire.link.sink().flush(&self.wire.stop)?;
        if self.driver.engine.handover() != Handover::Native {
            // The next byte commits: a QEMU that has died by now leaves no doubt, nor a command that reads nothing.
            self.poll_return_path()?;
            self.wire.link.sink().await_read(&self.wire.stop)?;
        }
        Ok(SourceEvent::Done)
    }

    fn send_native_state(&mut self, state: &[u8]) -> Result<(), Error> {
        let id = RAM_SECTION_ID + 1;
        let mut head = Vec::new();
        self.encode_skips(&mut head);
        encode_state_head(id, state.len(), &mut head);
        let mut end = Vec::new();
        self.settings.framing.encode_footer(id, &mut end);
        self.encode_counts(&mut end);
        self.encode_state_fingerprints(state, &mut end);
        Command::Native(Order::StateSent).encode(&mut end);
        let parts = [SendPart::Own(&head), SendPart::Own(state), SendPart::Own(&end)];
        Ok(self.wire.link.sink().send(&parts, &self.wire.stop)?)
    }

    /// Meanwhile the peer makes its own digest and compares. While ours is made, PINGs serve as keepalives, and a
    /// cancel is noticed.
    pub(super) fn send_digest(&mut self) -> Result<SourceEvent, Error> {
        let settings = &self.settings;
        let configuration = (&settings.configuration, &settings.vmm_configuration[..]);
        let carried = carried(settings.framing, configuration, &settings.early_sections);
        let Self { guest, wire, settings, departure, pages, breakage, .. } = self;
        let (state, stop) = (&departure.state, wire.stop.clone());
        let compare_all = breakage.is(Breakage::CompareSkipped);
        let unsent = if compare_all { PageSet::default() } else { pages.skips.unsent().clone() };
        let digest = Digest::make((&guest.memory, unsent), &carried, state, &settings.spawner, || {
            if let Some(reason) = stop.reason() {
                return Err(ChannelError::Stopped { reason, doing: "making the digest" }.into());
            }
            let mut ping = Vec::new();
            Command::Ping(ORDINARY_PING).encode(&mut ping);
            wire.send(&ping)?;
            Ok(wire.flush()?)
        })?;
        let bytes: Vec<u8> = digest.0.iter().flat_map(|value| value.to_be_bytes()).collect();
        let mut out = Vec::new();
        for (at, values) in bytes.chunks(MAX_DIGESTS * 8).enumerate() {
            let first = (at * MAX_DIGESTS) as u32;
            Command::Native(Order::Digest { first, values }).encode(&mut out);
        }
        self.wire.send(&out)?;
        self.wire.link.sink().flush(&self.wire.stop)?;
        Ok(SourceEvent::Done)
    }

    /// From the first byte of this on the guest is not ours: no cancel breaks it off any more.
    pub(super) fn commit(&mut self) -> Result<SourceEvent, Error> {
        debug_assert!(self.driver.engine.is_committed());
        if self.driver.engine.is_postcopy() {
            // The pages that follow take their time, which the connection bounds.
            self.wire.stop = self.driver.control.connection().connected();
            self.wire.back.iter_mut().for_each(ReturnPath::acknowledge_at_once);
        } else if !self.breakage.is(Breakage::BreakOffAfterCommit) {
            let time = self.settings.finish_timeout;
            self.wire.stop = Stop::never().within(time);
            // An outage that ends in time must not cost the answer. Longer than the stop, which so ends every wait.
            self.wire.link.sink().tolerate_outage(time.saturating_mul(2));
        }
        if self.driver.engine.handover() == Handover::Native && !self.driver.engine.is_postcopy() {
            let mut order = Vec::new();
            let migration_id = self.settings.migration_id;
            Command::Native(Order::Commit { migration_id }).encode(&mut order);
            self.wire.send(&order)?;
        } else {
            self.wire.send(self.departure.committing())?;
        }
        self.wire.link.sink().flush(&self.wire.stop)?;
        if self.driver.engine.handover() == Handover::OneWay {
            self.wire.link.sink().finish(&self.wire.stop)?;
        }
        let position = self.wire.position();
        self.figures.position(position);
        if self.breakage.is(Breakage::ResumeAfterCommit) {
            let _ = self.guest.control.resume();
        }
        Ok(SourceEvent::Done)
    }
}

/// Where a QEMU's device state commits: at the byte that ends its sections. The VM description after it is read only by
/// tools. Without a description it is the last byte.
pub(super) fn commit_at(state: &[u8], framing: Framing) -> usize {
    sections_end(state, framing).unwrap_or(state.len().saturating_sub(1))
}
