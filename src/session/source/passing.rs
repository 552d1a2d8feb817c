//! Memory that is passed to a destination on the same host: its descriptors, and the blocks whose pages are no longer
//! sent.

use std::sync::Arc;

use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::observe::PassedMemory as Figures;
use crate::ram::{BlockName, RamBlock};
use crate::stream::native::Order;
use crate::stream::qemu::command::Command;
use crate::sys::SharedFile;
use crate::units::BlockIndex;

use super::SourceSession;
use crate::session::passed::{PassedMemory, no_postcopy};
use crate::session::{Breakage, Error};

/// The memory that is passed in this migration.
#[derive(Default)]
pub(super) struct Passed {
    blocks: Vec<BlockName>,
    /// The guest's memory as the embedder gave it.
    before: Option<Arc<dyn GuestMemory>>,
    /// The peer has all memory before the migration begins.
    ahead: bool,
}

impl Passed {
    /// The blocks that went as descriptors.
    pub(super) fn into_blocks(self) -> Vec<BlockName> {
        self.blocks
    }
}

impl SourceSession {
    /// All of the guest's memory was passed to the destination before
    /// ([`memory_to_pass`](crate::session::memory_to_pass), [`CprSender`](crate::transport::CprSender)): none of its
    /// pages is sent. The guest has stood still since.
    ///
    /// A QEMU maps the memory and loads device state before COMMIT. What it writes while it does so is in the memory of
    /// this end too, as it is between two QEMUs.
    #[must_use]
    pub fn with_memory_passed(mut self) -> Self {
        self.departure.passed.ahead = true;
        self
    }

    /// Said in HELLO.
    pub(super) fn may_pass_memory(&mut self) -> bool {
        self.settings.pass_memory
            && !self.departure.passed.ahead
            && self.wire.link.sink().carries_descriptors()
    }

    /// Said in HELLO.
    pub(super) fn has_passed_ahead(&self) -> bool {
        self.departure.passed.ahead
    }

    pub(super) fn refuse_passing(&self) -> Result<(), Error> {
        let ahead = self.departure.passed.ahead;
        match () {
            () if (ahead || self.settings.pass_memory) && self.settings.postcopy.is_some() => {
                Err(no_postcopy())
            }
            // What takes the stream may be a file, and the memory is not in it.
            () if ahead && self.wire.back.is_none() => Err(Error::Config {
                what:
                    "memory was passed ahead, and the connection carries no answers: nobody there could say \
                    that it has the memory"
                        .into(),
                remedy: Remedy::Advice("use a socket on which the process answers that has the memory"),
            }),
            () => Ok(()),
        }
    }

    /// The destination takes memory: sends the descriptors of all blocks that have one, sealed where they can be.
    /// Blocks without one are sent page by page.
    pub(super) fn pass_memory(&mut self) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        let mut names = Vec::new();
        for (block, file) in passable(&*memory) {
            let (start, len) = (file.start(), block.max_length);
            if !file.seal() {
                tracing::warn!(
                    block = block.name.as_str(),
                    "this memory's file can't be sealed: another process that has it open can truncate it"
                );
            }
            let mut order = Vec::new();
            Command::Native(Order::Memory { start, len, block: block.name.as_str() }).encode(&mut order);
            self.wire.link.sink().send_descriptor(&order, file.descriptor(), &self.wire.stop)?;
            names.push(block.name);
        }
        self.leave_out(names)
    }

    /// Before the first round.
    pub(super) fn leave_out_passed_ahead(&mut self) -> Result<(), Error> {
        match self.departure.passed.ahead {
            true => self.leave_out(names_of(&*self.guest.memory)),
            false => Ok(()),
        }
    }

    /// The destination has the memory of these blocks: none of their pages is sent.
    fn leave_out(&mut self, names: Vec<BlockName>) -> Result<(), Error> {
        let memory = Arc::clone(&self.guest.memory);
        let seen = PassedMemory::over(Arc::clone(&memory), |block| names.contains(&block.name))?;
        let mut figures = Figures::default();
        for (index, block) in (0..).map(BlockIndex).zip(memory.table().blocks()) {
            if names.contains(&block.name) {
                figures.blocks += 1;
                figures.bytes += block.used_length;
                self.pages.forget(index, memory.table().pages_of(block));
            }
        }
        self.figures.passed(seen.table(), figures);
        self.guest.memory = seen;
        self.departure.passed.before = Some(memory);
        self.departure.passed.blocks = names;
        Ok(())
    }

    /// The migration has failed: the memory is this guest's alone, and none of it is at the destination.
    pub(super) fn take_memory_back(&mut self) {
        let Some(memory) = self.departure.passed.before.take() else { return };
        self.departure.passed.blocks.clear();
        if !self.breakage.is(Breakage::ForgetPassed) {
            self.guest.memory = memory;
            self.pages.mark_all_unsent();
        }
    }
}

/// The destination is a ramwire to which nobody has passed the memory.
pub(super) fn not_its_memory() -> Error {
    Error::Config {
        what: "the guest's memory was passed ahead of the migration, and the destination says that it has none of it"
            .into(),
        remedy: Remedy::Advice(
            "pass the memory to the process that takes the migration, or migrate without passing it",
        ),
    }
}

/// The migrated blocks that have a backing file.
fn passable(memory: &dyn GuestMemory) -> Vec<(RamBlock, SharedFile)> {
    let blocks = (0..).map(BlockIndex).zip(memory.table().blocks());
    let travelling = blocks.filter(|(_, block)| !block.flags.ignored);
    let with_file = travelling.filter_map(|(index, block)| {
        let file = memory.region(index)?.shared_file()?;
        file.check(block.max_length).ok()?;
        Some((block.clone(), file))
    });
    with_file.collect()
}

/// The migrated blocks.
fn names_of(memory: &dyn GuestMemory) -> Vec<BlockName> {
    let migrated = memory.table().blocks().iter().filter(|block| !block.flags.ignored);
    migrated.map(|block| block.name.clone()).collect()
}
