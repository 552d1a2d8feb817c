//! Races writers against syncs: a copy that is updated only from the reported pages must end up equal to the memory.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::synthetic::stride;
use super::{DirtyError, DirtySource, GuestMemory, MappedGuest, sync_all};
use crate::ram::{BlockName, ClearShift, DirtyMap, PageRun, RamBlock};
use crate::sys::Mapping;
use crate::units::{BlockIndex, PageIndex, PageSize};

const PAGE: u64 = 4096;
const WRITERS: u64 = 3;
/// Minimum number of syncs in each pass; writers wait for them, so that each writer runs in parallel with syncs.
const SYNCS: u64 = 6;

/// Blocks named b0, b1, ... over the mappings.
pub(super) fn guest_of(mappings: &[Mapping]) -> MappedGuest {
    let block = |(index, mapping): (usize, &Mapping)| {
        let name = BlockName::new(&format!("b{index}")).unwrap();
        (RamBlock::new(name, mapping.region().len()), mapping.clone())
    };
    let blocks = mappings.iter().enumerate().map(block);
    let builder = MappedGuest::builder(PageSize::SIZE_4K);
    blocks.fold(builder, |builder, (block, mapping)| builder.mapping(block, &mapping)).build().unwrap()
}

/// How the race ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Pages whose copy differs from the memory: writes that no sync reported.
    pub(super) lost: u64,
    /// Pages that syncs reported during the passes.
    pub(super) reported: u64,
}

/// Runs `passes` races. In each, three writers write every page exactly once (no later write hides a lost one) while
/// syncs run in parallel, and afterwards the copy is compared.
///
/// `write` stores the bytes the way the tracked writers do.
pub(super) fn race(
    guest: &MappedGuest,
    sources: &[Arc<dyn DirtySource>],
    passes: u64,
    write: &(dyn Fn(PageRun, [u8; 16]) + Sync),
) -> Result<Outcome, DirtyError> {
    let pages = guest.table().total() / PAGE;
    let share = |pass: u64, writer: u64, synced: &AtomicU64| {
        for at in (writer..pages).step_by(WRITERS as usize) {
            let gate = Instant::now() + Duration::from_secs(20);
            while synced.load(Ordering::Acquire) < at * SYNCS / pages && Instant::now() < gate {
                std::thread::yield_now();
            }
            let mut stamp = [0; 16];
            stamp[..8].copy_from_slice(&pass.to_le_bytes());
            stamp[8..].copy_from_slice(&(at + 1).to_le_bytes());
            write(run_of(guest, scattered(at, pages)), stamp);
        }
    };
    race_passes(guest, sources, passes, &|pass, synced| {
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                scope.spawn(move || share(pass, writer, synced));
            }
        });
    })
}

/// As [`race`], with any writers: `pass` makes the writes of a pass, given its number (from 1) and the count of syncs
/// so far, and returns after the last write.
pub(super) fn race_passes(
    guest: &MappedGuest,
    sources: &[Arc<dyn DirtySource>],
    passes: u64,
    pass: &(dyn Fn(u64, &AtomicU64) + Sync),
) -> Result<Outcome, DirtyError> {
    let mut follower = Follower::new(guest);
    sources.iter().try_for_each(|source| source.start())?;
    follower.copy_all();
    let mut outcome = Outcome::default();
    for number in 1..=passes {
        let synced = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let writers = scope.spawn(|| pass(number, &synced));
            while !writers.is_finished() {
                outcome.reported += follower.sync(sources)?;
                synced.fetch_add(1, Ordering::Release);
            }
            Ok(())
        })?;
        follower.sync(sources)?;
        outcome.lost += follower.differing();
    }
    sources.iter().try_for_each(|source| source.stop())?;
    Ok(outcome)
}

/// A fixed permutation of `0..pages`, so that neighbours are written far apart in time.
fn scattered(at: u64, pages: u64) -> u64 {
    (u128::from(at) * u128::from(stride(pages)) % u128::from(pages)) as u64
}

fn run_of(guest: &MappedGuest, mut page: u64) -> PageRun {
    for (index, block) in guest.table().blocks().iter().enumerate() {
        let pages = block.used_length / PAGE;
        if page < pages {
            return PageRun { block: BlockIndex(index as u32), first: PageIndex(page), pages: 1 };
        }
        page -= pages;
    }
    unreachable!("pages are counted over the table")
}

/// Stores `stamp` at an offset in the page that depends on the stamp; the plain writer of this process.
pub(super) fn store(guest: &MappedGuest, run: PageRun, stamp: [u8; 16]) {
    let span = guest.span(guest.table().admit_run(run).unwrap()).unwrap();
    let at = usize::from(stamp[8]) * 16 % (PAGE as usize - 16);
    span.part(at, 16).unwrap().copy_from(&stamp);
}

/// A copy of guest memory that is updated only with dirty pages.
pub(super) struct Follower<'a> {
    guest: &'a MappedGuest,
    dirty: DirtyMap,
    copy: Vec<Vec<u8>>,
}

impl<'a> Follower<'a> {
    pub(super) fn new(guest: &'a MappedGuest) -> Self {
        let table = guest.table();
        let copy = table.blocks().iter().map(|block| vec![0; block.used_length as usize]).collect();
        Self { guest, dirty: DirtyMap::new(table, ClearShift::new(6).unwrap()), copy }
    }

    pub(super) fn copy_all(&mut self) {
        for (index, copy) in self.copy.iter_mut().enumerate() {
            let whole = self.guest.table().whole(BlockIndex(index as u32)).unwrap();
            self.guest.span(self.guest.table().admit_run(whole).unwrap()).unwrap().copy_to(copy);
        }
    }

    /// A round like the engine's: sync, clear the bits, re-protect, read. Returns the number of pages copied.
    pub(super) fn sync(&mut self, sources: &[Arc<dyn DirtySource>]) -> Result<u64, DirtyError> {
        let table = self.guest.table();
        sync_all(sources, table, &mut self.dirty)?;
        let mut copied = 0;
        for block in (0..table.blocks().len()).map(|index| BlockIndex(index as u32)) {
            let mut from = PageIndex(0);
            while let Some(run) = self.dirty.take_run(block, from, 64) {
                if let Some(chunk) = self.dirty.take_clear_chunk(run) {
                    sources.iter().try_for_each(|source| source.reprotect(chunk))?;
                }
                let span = self.guest.span(table.admit_run(run).unwrap()).unwrap();
                let start = (run.first.0 * PAGE) as usize;
                copied += run.pages;
                span.copy_to(&mut self.copy[block.as_usize()][start..start + span.len()]);
                from = run.end();
            }
        }
        Ok(copied)
    }

    pub(super) fn differing(&self) -> u64 {
        let mut now = vec![0; PAGE as usize];
        let mut differing = 0;
        for (block, _, region) in self.guest.regions() {
            for (page, copy) in self.copy[block.as_usize()].chunks(PAGE as usize).enumerate() {
                region.span(page as u64 * PAGE, PAGE).unwrap().copy_to(&mut now);
                differing += u64::from(now != copy);
            }
        }
        differing
    }
}
