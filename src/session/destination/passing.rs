//! Memory that a source on the same host passes: the descriptors that arrive, and the orders that keep the source's
//! guest whole until it is handed over.
//!
//! Until COMMIT this end only maps what was passed. No page is placed in it, and the device state is loaded after COMMIT: a
//! VMM that loads it may write to guest memory.

use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::observe::PassedMemory as Counts;
use crate::ram::BlockName;

use super::receive::out_of_turn;
use super::{DestinationSession, Incoming};
use crate::session::passed::{
    NotPassed, PassedBlock, PassedMemory, check_all, check_announced, check_provided,
};
use crate::session::{Breakage, Error};

impl DestinationSession {
    /// All of the guest's memory has arrived before the stream, from a QEMU in mode cpr-transfer
    /// ([`CprListener`](crate::transport::CprListener)): none of its pages is sent. The provider finds it in
    /// [`Incoming::passed`]. A block without memory, and memory without a block, end the migration.
    #[must_use]
    pub fn with_memory(mut self, passed: Vec<PassedBlock>) -> Self {
        (self.reported.passed, self.reported.passed_ahead) = (passed, true);
        self
    }

    /// Before the first read: a descriptor arrives with the byte that it belongs to, or is lost.
    pub(super) fn await_memory(&mut self) {
        if self.settings.take_memory {
            self.wire.link.stream().want_descriptors(true);
        }
    }

    /// Said in the answer to HELLO.
    pub(super) fn takes_memory(&mut self) -> bool {
        self.settings.take_memory
            && !self.switch.is_advised()
            && self.wire.link.stream().want_descriptors(true)
    }

    /// MEMORY.
    pub(super) fn take_memory(&mut self, block: &str, place: (u64, u64)) -> Result<(), Error> {
        if !self.reported.passes || self.ingest.incoming().is_some() {
            return Err(out_of_turn("MEMORY", "no memory is passed, or all of it has come"));
        }
        let name = BlockName::new(block)
            .map_err(|_| out_of_turn("MEMORY of a block without a name", "taking memory"))?;
        if self.reported.passed.iter().any(|passed| *passed.name() == name) {
            return Err(Error::Passed { block: name, why: NotPassed::Announced("twice") });
        }
        if self.reported.passed.len() >= crate::ram::MAX_BLOCKS {
            return Err(out_of_turn("MEMORY of more blocks than there may be", "taking memory"));
        }
        let descriptor = self.wire.link.stream().next_descriptor();
        self.reported.passed.push(PassedBlock::received(name, descriptor, place)?);
        Ok(())
    }

    /// The list of blocks is here: no more memory follows.
    pub(super) fn all_was_passed(&mut self, incoming: &Incoming) -> Result<(), Error> {
        if self.reported.passes {
            self.wire.link.stream().want_descriptors(false);
        }
        if self.reported.passed_ahead {
            check_all(&incoming.passed, &incoming.blocks)?;
        }
        check_announced(&incoming.passed, &incoming.blocks)
    }

    /// The provided memory, of which the passed blocks are not written to.
    pub(super) fn accept_passed(
        &mut self,
        incoming: &Incoming,
        memory: Arc<dyn GuestMemory>,
    ) -> Result<Arc<dyn GuestMemory>, Error> {
        let passed = &incoming.passed;
        if passed.is_empty() {
            return Ok(memory);
        }
        check_provided(passed, &*memory)?;
        if !self.breakage.is(Breakage::LoadBeforeCommit) {
            self.driver.engine.load_after_commit();
        }
        let lengths = incoming.blocks.iter().filter(|block| passed.iter().any(|p| *p.name() == block.name));
        let bytes = lengths.map(|block| block.used_length).sum();
        let counts = Counts { blocks: passed.len() as u64, bytes };
        self.figures.shared().update(|s| s.passed = counts);
        let is_passed = |name: &BlockName| passed.iter().any(|block| block.name() == name);
        Ok(PassedMemory::over(memory, |block| is_passed(&block.name))?)
    }

    /// Before READY: a file that could not be sealed may have become shorter, and memory that was touched may be lost.
    pub(super) fn check_passed(&self) -> Result<(), Error> {
        let Some(incoming) = self.ingest.incoming().filter(|incoming| !incoming.passed.is_empty()) else {
            return Ok(());
        };
        incoming.passed.iter().try_for_each(PassedBlock::check)?;
        self.ingest.lost_memory()
    }
}
