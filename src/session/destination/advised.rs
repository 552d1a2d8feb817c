//! A source that may switch to postcopy, up to the package that hands over its guest.

use std::sync::Arc;

use crate::error::Remedy;
use crate::guest::{Placer, ServeError};
use crate::ram::{PageSet, RamBlockTable};
use crate::stream::qemu::command::Discard;
use crate::sys::MissingFaults;
use crate::transport::PulledPages;
use crate::units::BlockOffset;

use super::DestinationSession;
use super::receive::out_of_turn;
use crate::session::Error;

/// What the source has sent from ADVISE on, before the guest has moved.
pub(super) struct Advised {
    /// `None` if the guest would run elsewhere, at a relay's far end.
    faults: Option<MissingFaults>,
    /// The source's host page sizes, ORed.
    host_pages: u64,
    package: Vec<u8>,
    /// Pages that were discarded.
    expected_pages: PageSet,
    /// What reads the missing pages, if the source sends none.
    supply: Option<Arc<dyn PulledPages>>,
}

impl Advised {
    /// Checks everything that a switch needs before the first page arrives.
    ///
    /// # Errors
    /// There is no userfaultfd for this process. `handed_in` is the embedder's.
    pub(super) fn new(host_pages: u64, handed_in: Option<MissingFaults>) -> Result<Self, Error> {
        // A descriptor for faults of user mode only needs no privilege, but KVM and read(2) access the guest from the
        // kernel: that would fail after RUN, when the source does not take its guest back any more.
        let faults = handed_in.map_or_else(MissingFaults::new, Ok).map_err(ServeError::from)?;
        Ok(Self::with(faults, host_pages))
    }

    pub(super) fn with(faults: MissingFaults, host_pages: u64) -> Self {
        Self { faults: Some(faults), ..Self::elsewhere(host_pages) }
    }

    /// At a relay: no guest runs here.
    pub(super) fn elsewhere(host_pages: u64) -> Self {
        Self {
            faults: None,
            host_pages,
            package: Vec::new(),
            expected_pages: PageSet::default(),
            supply: None,
        }
    }

    /// The missing pages are read by `supply`.
    pub(super) fn read_by(&mut self, supply: Arc<dyn PulledPages>) {
        self.supply = Some(supply);
    }

    /// What reads the missing pages, if the source sends none.
    pub(super) fn take_supply(&mut self) -> Option<Arc<dyn PulledPages>> {
        self.supply.take()
    }

    pub(super) fn serves_here(&self) -> bool {
        self.faults.is_some()
    }

    /// The source's host page sizes must equal ours, otherwise pages would be placed in parts.
    ///
    /// # Errors
    /// They differ.
    pub(super) fn check_host_pages(&self, table: &RamBlockTable) -> Result<(), Error> {
        let used = table.blocks().iter().filter(|block| !block.flags.ignored);
        let (theirs, ours) = (self.host_pages, used.fold(0, |all, block| all | block.host_page.bytes()));
        if ours == theirs {
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

    /// Appends a piece of the package; false if the package would be longer than `limit`.
    pub(super) fn package_bytes(&mut self, bytes: &[u8], limit: u64) -> bool {
        let fits = (self.package.len() + bytes.len()) as u64 <= limit;
        if fits {
            self.package.extend_from_slice(bytes);
        }
        fits
    }

    /// A discard at the switchover: these pages will be sent again.
    ///
    /// # Errors
    /// They are not whole pages of a block.
    pub(super) fn discard(&mut self, discard: Discard<'_>, placer: &Placer) -> Result<(), Error> {
        let table = placer.memory().table();
        let index = table.find(discard.block()).map_err(|error| refused(&error.to_string()))?;
        let page = table.get(index).map_or(table.page(), |block| block.host_page).bytes();
        for (start, length) in discard.ranges() {
            if start % page != 0 || length % page != 0 || length == 0 {
                let what = format!("{length} bytes at {start:#x} are not whole pages of {page} bytes");
                return Err(refused(&what));
            }
            let landing = table
                .admit(index, BlockOffset(start), length)
                .map_err(|error| refused(&error.to_string()))?;
            placer.forget(landing)?;
            if self.expected_pages.blocks() == 0 {
                self.expected_pages = PageSet::new(table);
            }
            self.expected_pages.add(placer.run(landing));
        }
        Ok(())
    }

    /// The package is complete: returns the descriptor for faults if the guest
    /// runs here, the package, and the pages that will be sent again.
    pub(super) fn into_parts(self) -> (Option<MissingFaults>, Vec<u8>, PageSet) {
        (self.faults, self.package, self.expected_pages)
    }
}

/// A discard that can't be.
pub(super) fn refused(why: &str) -> Error {
    out_of_turn(&format!("POSTCOPY_RAM_DISCARD, {why}"), "a switchover to postcopy")
}

impl DestinationSession {
    /// The memory of a source that may switch is known: makes ready to read its missing pages, where it sends none.
    pub(super) fn prepare_reads(&mut self, table: &RamBlockTable) -> Result<(), Error> {
        if !self.switch.serves_here() {
            return Ok(());
        }
        let used = table.blocks().iter().filter(|block| !block.flags.ignored);
        let host_page = used.map(|block| block.host_page.bytes()).max().unwrap_or(0);
        if let Some(supply) = self.wire.link.read_missing(host_page.max(table.page().bytes()))? {
            self.switch.read_by(supply);
        }
        Ok(())
    }

    /// The source may switch to postcopy.
    pub(super) fn advised(&mut self, host_pages: u64) -> Result<(), Error> {
        let able = self.wire.link.abilities();
        if able.has_rounds && !able.reads_missing {
            return Err(Error::Config {
                what: "the source may switch to postcopy, and its missing pages can't be read by RDMA: it is a QEMU, or one \
                       of the devices does no RDMA READ"
                    .into(),
                remedy: Remedy::Advice("turn postcopy-ram off at the source, or let it come over TCP"),
            });
        }
        let advised = match self.ingest.relays_postcopy()? {
            true if self.reported.spread => {
                return Err(Error::Config {
                    what: "the source may switch to postcopy with page channels, and a relay takes missing pages in \
                           the stream only"
                        .into(),
                    remedy: Remedy::Advice("leave the page channels out, or migrate without a relay"),
                });
            }
            true if able.has_rounds => {
                return Err(Error::Config {
                    what: "the source may switch to postcopy, and a relay reads no missing pages by RDMA"
                        .into(),
                    remedy: Remedy::Advice("let it come over TCP, or migrate without a relay"),
                });
            }
            true => Advised::elsewhere(host_pages),
            false => Advised::new(host_pages, self.switch.take_handed_in())?,
        };
        self.switch.advise(advised);
        Ok(())
    }
}
