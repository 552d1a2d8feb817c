//! Checks that RAM and device state arrived as they were sent.
//!
//! XXH3 (64 bits) of every 16 MiB range of every block, made on all cores while the guest is paused: an earlier digest
//! could not see a lost dirty bit. It guards against loss, not against a forger.

use std::hash::Hasher as _;
use std::sync::Arc;

use twox_hash::XxHash3_64;

use crate::guest::{GuestError, GuestMemory, span_of};
use crate::ram::{BlockName, Landing, PageRun, PageSet, RamBlockTable};
use crate::session::Error;
use crate::session::workers::Spawner;
use crate::stream::qemu::file::{Configuration, encode_configuration};
use crate::stream::qemu::section::Framing;
use crate::units::{BlockIndex, BlockOffset, PageIndex};

/// Bytes under one digest.
pub(crate) const RANGE: u64 = 16 << 20;

/// Bytes copied out of guest RAM at a time; stays in the cache.
const WINDOW: usize = 64 << 10;

/// Where RAM differs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Mismatch {
    /// A range of a block.
    #[error("RAM block {block} differs from the source's between {from} and {to:#x}")]
    Ram {
        /// The block.
        block: BlockName,
        /// Start of the first range that differs.
        from: BlockOffset,
        /// End of the last of the differing ranges that follow the first without a gap.
        to: u64,
    },
    /// The device state.
    #[error("the device state or the description of the machine differs from the source's")]
    State,
    /// The lists can't be compared.
    #[error("the source's digest covers {theirs} ranges, this guest has {ours}")]
    Shape {
        /// Ranges in the peer's list.
        theirs: usize,
        /// Ranges in ours.
        ours: usize,
    },
}

/// Digests of all ranges of all travelling blocks in table order, the device state's last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Digest(pub Vec<u64>);

impl Digest {
    /// Reads all RAM of `guest`, which must be paused, except the pages that were not sent: those count as zeros and
    /// are not read. `carried` is the content of the stream other than RAM and device state, as the session carries it.
    /// `still_at_it` is called about once a second.
    ///
    /// # Errors
    /// [`Error::Guest`], [`Error::Thread`] and what `still_at_it` answers.
    pub(crate) fn make(
        (guest, unsent): (&Arc<dyn GuestMemory>, PageSet),
        carried: &[u8],
        state: &[u8],
        spawner: &Spawner,
        still_at_it: impl FnMut() -> Result<(), Error>,
    ) -> Result<Self, Error> {
        let ranges = ranges(guest.table());
        let memory = Arc::clone(guest);
        let work = ranges.clone();
        let hash = move |item: usize| hash_landing(&*memory, work[item], &unsent);
        let hashes = spawner.map_watched("ramwire-digest", ranges.len(), hash, still_at_it)?;
        let mut digest = hashes.into_iter().collect::<Result<Vec<u64>, GuestError>>()?;
        let mut hash = XxHash3_64::new();
        hash.write(carried);
        hash.write(state);
        digest.push(hash.finish());
        Ok(Self(digest))
    }

    /// Reads a part of RAM as [`make`](Self::make) does and returns which share of it that was: for an
    /// estimate of the time. The guest may run.
    ///
    /// # Errors
    /// As [`make`](Self::make).
    pub(crate) fn sample(
        (guest, unsent): (&Arc<dyn GuestMemory>, PageSet),
        spawner: &Spawner,
    ) -> Result<f64, Error> {
        let ranges = ranges(guest.table());
        let items = ranges.len().min(2 * spawner.workers());
        let bytes = |ranges: &[Landing]| ranges.iter().map(|range| range.len()).sum::<u64>() as f64;
        let share = bytes(&ranges[..items]) / bytes(&ranges).max(1.0);
        let memory = Arc::clone(guest);
        let hashes = spawner.map("ramwire-digest", items, move |item| {
            ranges.get(item).map_or(Ok(0), |range| hash_landing(&*memory, *range, &unsent))
        })?;
        hashes.into_iter().collect::<Result<Vec<u64>, GuestError>>()?;
        Ok(share)
    }

    /// Compares with the peer's.
    ///
    /// # Errors
    /// [`Mismatch`], which names the block and the range.
    pub(crate) fn compare(&self, theirs: &Self, table: &RamBlockTable) -> Result<(), Mismatch> {
        if self.0.len() != theirs.0.len() {
            return Err(Mismatch::Shape { theirs: theirs.0.len(), ours: self.0.len() });
        }
        let differs = |at: usize| self.0.get(at) != theirs.0.get(at);
        let ranges = ranges(table);
        let Some(first) = (0..ranges.len()).find(|at| differs(*at)) else {
            return if differs(ranges.len()) { Err(Mismatch::State) } else { Ok(()) };
        };
        let block = ranges[first].block();
        let mut last = first;
        while ranges.get(last + 1).is_some_and(|next| next.block() == block) && differs(last + 1) {
            last += 1;
        }
        let name = table.get(block).map(|block| block.name.clone());
        name.map_or(Err(Mismatch::State), |name| {
            Err(Mismatch::Ram {
                block: name,
                from: ranges[first].offset(),
                to: ranges[last].offset().0 + ranges[last].len(),
            })
        })
    }
}

/// The part of the stream about the machine that is not interpreted: a changed byte in it must be detected, too.
pub(super) fn carried(
    framing: Framing,
    (configuration, of_vmm): (&Configuration, &[u8]),
    early_sections: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    if framing.configuration {
        encode_configuration(configuration, &mut bytes);
    }
    bytes.extend_from_slice(of_vmm);
    bytes.extend_from_slice(early_sections);
    bytes
}

/// Number of digests a guest has: what a peer's list must hold.
pub(crate) fn digests_of(table: &RamBlockTable) -> usize {
    ranges(table).len() + 1
}

pub(super) fn ranges(table: &RamBlockTable) -> Vec<Landing> {
    let mut ranges = Vec::new();
    for (index, block) in table.blocks().iter().enumerate() {
        let mut offset = 0;
        while offset < block.used_length {
            let len = RANGE.min(block.used_length - offset);
            // An ignored block is refused here, as it is everywhere: its pages are not sent.
            let landing = table.admit(BlockIndex(index as u32), BlockOffset(offset), len);
            ranges.extend(landing.ok());
            offset += len;
        }
    }
    ranges
}

fn hash_landing(guest: &dyn GuestMemory, landing: Landing, unsent: &PageSet) -> Result<u64, GuestError> {
    let page = guest.table().page();
    if unsent.touches(landing.run(page)) {
        return hash_sent(guest, landing, unsent);
    }
    let span = span_of(guest, landing)?;
    let region = guest.region(landing.block());
    let mut window = vec![0u8; WINDOW];
    let mut hash = XxHash3_64::new();
    let mut at = 0;
    while let Some(part) = span.part(at, WINDOW.min(span.len() - at)).filter(|part| !part.is_empty()) {
        let window = &mut window[..part.len()];
        let offset = landing.offset().0 + at as u64;
        if !region.as_ref().is_some_and(|region| region.read_sparse(offset, window)) {
            part.copy_to(window);
        }
        hash.write(window);
        at += part.len();
    }
    Ok(hash.finish())
}

/// As [`hash_landing`], page by page, and those that were not sent are zeros.
fn hash_sent(guest: &dyn GuestMemory, landing: Landing, unsent: &PageSet) -> Result<u64, GuestError> {
    let run = landing.run(guest.table().page());
    let region = guest.region(landing.block());
    let page_bytes = guest.table().page().bytes() as usize;
    let mut window = vec![0u8; page_bytes];
    let mut hash = XxHash3_64::new();
    for page in (run.first.0..run.end().0).map(PageIndex) {
        let one = PageRun { block: run.block, first: page, pages: 1 };
        window.fill(0);
        if !unsent.contains(run.block, page) {
            let landing = guest.table().admit_run(one)?;
            let offset = landing.offset().0;
            if !region.as_ref().is_some_and(|region| region.read_sparse(offset, &mut window)) {
                span_of(guest, landing)?.copy_to(&mut window);
            }
        }
        hash.write(&window);
    }
    Ok(hash.finish())
}
