//! A source that may switch to postcopy, up to the package that gives its guest away.

use std::sync::Arc;

use crate::error::Remedy;
use crate::guest::ServeError;
use crate::ram::{PageSet, RamBlockTable};
use crate::stream::qemu::command::Discard;
use crate::sys::MissingFaults;
use crate::units::BlockOffset;

use super::DestinationSession;
use super::receive::out_of_turn;
use crate::session::Error;

/// What the source has said from ADVISE on, before its guest has moved.
pub(super) struct Advised {
    pub(super) faults: MissingFaults,
    /// The source's host page sizes, ORed.
    pub(super) host_pages: u64,
    pub(super) package: Vec<u8>,
    /// Pages that were discarded.
    pub(super) owed: PageSet,
}

impl DestinationSession {
    /// The source may switch to postcopy: what that needs is tried before the first page comes.
    pub(super) fn advised(&mut self, host_pages: u64) -> Result<(), Error> {
        if self.wire.link.abilities().has_rounds {
            return Err(Error::Config {
                what: "the source may switch to postcopy, and pages come by RDMA into registered memory"
                    .into(),
                remedy: Remedy::Advice("turn postcopy-ram off at the source, or let it come over TCP"),
            });
        }
        // A descriptor for faults of user mode only needs no right, but KVM and read(2) touch the guest from the kernel: their
        // accesses would fail behind RUN, when the source does not take its guest back any more.
        let faults = MissingFaults::new().map_err(ServeError::from)?;
        self.advised = Some(Advised { faults, host_pages, package: Vec::new(), owed: PageSet::default() });
        Ok(())
    }

    /// The source's host page sizes must be ours, or pages would be placed in parts.
    pub(super) fn check_host_pages(&self, table: &RamBlockTable) -> Result<(), Error> {
        let Some(Advised { host_pages: theirs, .. }) = &self.advised else { return Ok(()) };
        let used = table.blocks().iter().filter(|block| !block.flags.ignored);
        let ours = used.fold(0, |all, block| all | block.host_page.bytes());
        if ours == *theirs {
            return Ok(());
        }
        Err(Error::Config {
            what: format!(
                "the source's RAM is in pages of {theirs:#x} bytes (sizes ORed), here in pages of {ours:#x}"
            ),
            remedy: Remedy::Advice(
                "give both ends the same huge pages, or turn postcopy-ram off at the source",
            ),
        })
    }

    /// A piece of the package.
    pub(super) fn package_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let limit = self.settings.max_state;
        match &mut self.advised {
            Some(Advised { package, .. }) if (package.len() + bytes.len()) as u64 <= limit => {
                package.extend_from_slice(bytes);
                Ok(())
            }
            _ => Err(out_of_turn("more device state than is accepted", "a switchover to postcopy")),
        }
    }

    /// A discard at the switchover: these pages come again.
    pub(super) fn discard(&mut self, discard: Discard<'_>) -> Result<(), Error> {
        let refused =
            |why: String| out_of_turn(&format!("POSTCOPY_RAM_DISCARD, {why}"), "a switchover to postcopy");
        let placer = Arc::clone(self.placing()?.placer());
        let Some(Advised { owed, .. }) = &mut self.advised else {
            return Err(refused("without ADVISE, or after the package".into()));
        };
        let table = placer.memory().table();
        let index = table.find(discard.block()).map_err(|error| refused(error.to_string()))?;
        let page = table.get(index).map_or(table.page(), |block| block.host_page).bytes();
        for (start, length) in discard.ranges() {
            if start % page != 0 || length % page != 0 || length == 0 {
                return Err(refused(format!(
                    "{length} bytes at {start:#x} are not whole pages of {page} bytes"
                )));
            }
            let landing =
                table.admit(index, BlockOffset(start), length).map_err(|error| refused(error.to_string()))?;
            placer.forget(landing)?;
            if owed.blocks() == 0 {
                *owed = PageSet::new(table);
            }
            owed.add(placer.run(landing));
        }
        Ok(())
    }
}
