//! A switch to postcopy: from ADVISE, which announces it as possible, to the last page.

use std::sync::Arc;

use crate::guest::Placer;
use crate::ram::RamBlockTable;
use crate::stream::qemu::command::Discard;
use crate::sys::{MissingFaults, Stop};
use crate::transport::PulledPages;

use super::advised::{self, Advised};
use super::arrivals::{Connections, SharedNext};
use super::postcopy::Postcopy;
use super::receive::out_of_turn;
use super::relayed::Relayed;
use crate::session::Error;

/// Progress of a switch to postcopy.
#[derive(Default)]
pub(super) struct Switch {
    /// From the package on.
    running: Option<Postcopy>,
    /// From ADVISE to the package.
    advised: Option<Advised>,
    /// From the package on, at a relay.
    relayed: Option<Relayed>,
    /// Where the source may connect again.
    next: SharedNext,
    /// Where a relay's source makes its connection for urgent pages.
    urgent: SharedNext,
    /// The embedder's descriptor for faults.
    handed_in: Option<MissingFaults>,
}

impl Switch {
    /// The source may connect again.
    pub(super) fn may_reconnect(&self, connections: Connections) {
        self.next.put(Some(connections));
    }

    /// Where the source may connect again.
    pub(super) fn next(&self) -> &SharedNext {
        &self.next
    }

    /// A relay's source may make a connection for urgent pages.
    pub(super) fn takes_urgent_from(&self, connections: Connections) {
        self.urgent.put(Some(connections));
    }

    /// Where a relay's source makes its connection for urgent pages.
    pub(super) fn urgent(&self) -> &SharedNext {
        &self.urgent
    }

    /// True if a source may make a connection for urgent pages.
    pub(super) fn takes_urgent(&self) -> bool {
        self.may_recover() || self.urgent.is_there()
    }

    /// Faults are to be served by this descriptor.
    pub(super) fn hand_in(&mut self, faults: MissingFaults) {
        self.handed_in = Some(faults);
    }

    pub(super) fn take_handed_in(&mut self) -> Option<MissingFaults> {
        self.handed_in.take()
    }

    /// ADVISE was received.
    pub(super) fn advise(&mut self, advised: Advised) {
        self.advised = Some(advised);
    }

    /// What reads the missing pages of a source that has announced ADVISE.
    pub(super) fn read_by(&mut self, supply: Arc<dyn PulledPages>) {
        if let Some(advised) = &mut self.advised {
            advised.read_by(supply);
        }
    }

    /// The source may switch, and its guest has not moved.
    pub(super) fn is_advised(&self) -> bool {
        self.advised.is_some()
    }

    /// True if the guest of such a source would run here, among missing pages.
    pub(super) fn serves_here(&self) -> bool {
        self.advised.as_ref().is_some_and(Advised::serves_here)
    }

    /// The guest runs at a relay's far end, and pages are missing.
    pub(super) fn relay(&mut self, relayed: Relayed) {
        self.relayed = Some(relayed);
    }

    pub(super) fn relayed(&self) -> Option<&Relayed> {
        self.relayed.as_ref()
    }

    pub(super) fn relayed_mut(&mut self) -> Option<&mut Relayed> {
        self.relayed.as_mut()
    }

    /// The package is whole.
    pub(super) fn take_advised(&mut self) -> Option<Advised> {
        self.advised.take()
    }

    /// A source that may switch has the same host page sizes.
    ///
    /// # Errors
    /// It has others.
    pub(super) fn check_host_pages(&self, table: &RamBlockTable) -> Result<(), Error> {
        self.advised.as_ref().map_or(Ok(()), |advised| advised.check_host_pages(table))
    }

    /// Appends a piece of the package, which may have at most `limit` bytes.
    ///
    /// # Errors
    /// It is longer.
    pub(super) fn package_bytes(&mut self, bytes: &[u8], limit: u64) -> Result<(), Error> {
        let fits = self.advised.as_mut().is_some_and(|advised| advised.package_bytes(bytes, limit));
        let too_much = || out_of_turn("more device state than is accepted", "a switchover to postcopy");
        if fits { Ok(()) } else { Err(too_much()) }
    }

    /// A discard at the switchover: these pages will be sent again.
    ///
    /// # Errors
    /// Out of turn, or of pages that don't exist.
    pub(super) fn discard(&mut self, discard: Discard<'_>, placer: &Placer) -> Result<(), Error> {
        match &mut self.advised {
            Some(advised) => advised.discard(discard, placer),
            None => Err(advised::refused("without ADVISE, or after the package")),
        }
    }

    /// The guest is ours to start, and pages are missing.
    pub(super) fn begin(&mut self, postcopy: Postcopy) {
        self.running = Some(postcopy);
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.is_some()
    }

    pub(super) fn running(&self) -> Option<&Postcopy> {
        self.running.as_ref()
    }

    /// A thread may wait for a page of the stream: there is no other connection for such pages.
    pub(super) fn awaits_stream(&self) -> bool {
        self.running.as_ref().is_some_and(|postcopy| !postcopy.preempt.is_connected())
    }

    pub(super) fn running_mut(&mut self) -> Option<&mut Postcopy> {
        self.running.as_mut()
    }

    /// The migration has ended.
    pub(super) fn take(&mut self) -> Option<Postcopy> {
        self.running.take()
    }

    /// True if a lost connection may be followed by another.
    pub(super) fn may_recover(&self) -> bool {
        let failed = self.running.as_ref().is_some_and(|postcopy| postcopy.shared.has_failed());
        self.next.is_there() && !failed
    }

    /// A step or the connection failed. True if the received state is kept, since the guest runs here although pages
    /// are missing, or may have been handed over. `another`: the source may connect again.
    pub(super) fn survives_disconnect(&self, another: bool) -> bool {
        self.running.as_ref().is_some_and(|postcopy| postcopy.shared.survives_disconnect(another))
    }

    /// A cancel does not end a guest that the source has handed over; the failure of a postcopy's thread does.
    pub(super) fn stop_after_commit(&self) -> Stop {
        self.running.as_ref().map_or_else(Stop::never, |postcopy| postcopy.shared.stop())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::error::Chain;
    use crate::guest::GuestMemory as _;
    use crate::ram::{BlockName, RamBlock, RamBlockTable};
    use crate::session::tests::guest;
    use crate::stream::qemu::command::{Command, decode_command, encode_discards};
    use crate::sys::testing::has_userfaultfd;
    use crate::units::{BlockIndex, PageIndex, PageSize};

    const PAGE: u64 = 4096;

    /// The result of a discard of these ranges of `block0`, which has 3 pages.
    fn discard(switch: &mut Switch, placer: &Placer, ranges: &[(u64, u64)]) -> Result<(), String> {
        let mut bytes = Vec::new();
        encode_discards("block0", ranges, &mut bytes);
        let Command::PostcopyRamDiscard(discard) = decode_command(&bytes).unwrap().0 else { unreachable!() };
        switch.discard(discard, placer).map_err(|error| Chain(&error).to_string())
    }

    fn placer() -> Placer {
        let memory = guest(&[3]);
        let blocks = memory.table().blocks().to_vec();
        Placer::new(memory, &blocks, None).unwrap()
    }

    #[test]
    fn without_advise_there_is_no_switch() {
        let mut switch = Switch::default();
        assert!(!switch.is_advised() && !switch.is_running() && switch.take_advised().is_none());
        assert!(switch.package_bytes(b"devices", 100).is_err());
        let refused = discard(&mut switch, &placer(), &[(0, PAGE)]).unwrap_err();
        assert!(refused.contains("without ADVISE"), "{refused}");
        assert!(!switch.may_recover() && !switch.survives_disconnect(true));
        assert!(switch.stop_after_commit().reason().is_none());
    }

    #[test]
    fn a_connection_that_may_follow_is_what_a_loss_can_be_recovered_by() {
        let switch = Switch::default();
        switch.may_reconnect(Connections::new(Box::new(|_: &Stop| unreachable!("nothing was lost"))));
        assert!(switch.may_recover());
        let taken = switch.next().take();
        assert!(taken.is_some() && switch.may_recover(), "a thread that has it gives it back");
        switch.next().put(None);
        assert!(!switch.may_recover());
    }

    #[test]
    fn what_comes_from_advise_to_the_package_is_kept_within_its_limits() {
        if !has_userfaultfd() {
            return;
        }
        let (mut switch, placer) = (Switch::default(), placer());
        switch.advise(Advised::with(MissingFaults::user_mode_only().unwrap(), PAGE));
        switch.package_bytes(&[1; 60], 100).unwrap();
        assert!(switch.package_bytes(&[2; 41], 100).is_err());
        switch.package_bytes(&[3; 40], 100).unwrap();
        discard(&mut switch, &placer, &[(0, PAGE), (2 * PAGE, PAGE)]).unwrap();
        for wrong in [(1, PAGE), (0, PAGE + 1), (0, 0), (3 * PAGE, PAGE)] {
            discard(&mut switch, &placer, &[wrong]).unwrap_err();
        }
        let (_faults, package, expected_pages) = switch.take_advised().unwrap().into_parts();
        assert_eq!(package, [[1; 60].as_slice(), &[3; 40]].concat());
        let runs: Vec<_> = expected_pages.runs().map(|run| (run.block, run.first, run.pages)).collect();
        assert_eq!(runs, [(BlockIndex(0), PageIndex(0), 1), (BlockIndex(0), PageIndex(2), 1)]);
    }

    #[test]
    fn host_pages_of_another_size_are_refused() {
        if !has_userfaultfd() {
            return;
        }
        let block = RamBlock::new(BlockName::new("ram").unwrap(), 2 * PAGE);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap();
        for (theirs, same) in [(PAGE, true), (PAGE | 2 << 20, false), (2 << 20, false)] {
            let mut switch = Switch::default();
            assert!(switch.check_host_pages(&table).is_ok(), "nobody asks");
            switch.advise(Advised::with(MissingFaults::user_mode_only().unwrap(), theirs));
            assert_eq!(switch.check_host_pages(&table).is_ok(), same, "{theirs:#x}");
        }
    }
}
