//! Pages written by vCPUs: KVM's own dirty log.
//!
//! Reports writes by vCPUs, and by KVM itself on their behalf. It does not report writes by the VMM, its device threads
//! or backends: those need a source of their own in addition.
//!
//! If KVM supports it (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2), reading the log clears nothing. Bits are cleared and pages
//! protected chunk by chunk, when the page loop reaches the chunk ([`reprotect`](DirtySource::reprotect)), so that a
//! round does not begin with one long lock of all vCPUs' page tables. Only bits that a sync has handed out are ever
//! cleared: a write after that sync keeps its bit for the next one.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};

use super::{KvmSlot, Slot, Slots};
use crate::guest::{DirtyError, DirtySource, GuestMemory};
use crate::ram::{PageBitmap, PageRun};
use crate::sys::{KvmLog, Lock as _};
use crate::units::BlockIndex;

const NAME: &str = "kvm-log";
/// Dirty source over the log of a KVM VM.
#[derive(Debug)]
pub struct KvmDirtyLog {
    slots: Slots,
    /// Bits of each slot that a sync has handed out and that are still set in KVM.
    handed_out: Vec<Mutex<Vec<u64>>>,
    /// Reading the log does not clear bits; `reprotect` clears them.
    manual: AtomicBool,
    started: AtomicBool,
}

impl KvmDirtyLog {
    /// Tracks `slots` of the VM of the (duplicated) descriptor `vm`. While tracking is on, the VMM must not change
    /// these slots.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] for a slot that is not in whole pages inside its block.
    pub fn new(guest: &dyn GuestMemory, vm: OwnedFd, slots: &[KvmSlot]) -> Result<Self, DirtyError> {
        let slots = Slots::new(NAME, guest, vm, slots)?;
        let words = |slot: &Slot| Mutex::new(vec![0; slot.pages().div_ceil(64) as usize]);
        let handed_out = slots.list().iter().map(words).collect();
        Ok(Self { slots, handed_out, manual: false.into(), started: false.into() })
    }

    /// The slots over `block`, each with its bits that were handed out.
    fn slots_of(&self, block: BlockIndex) -> impl Iterator<Item = (&Slot, MutexGuard<'_, Vec<u64>>)> {
        let all = self.slots.list().iter().zip(&self.handed_out);
        all.filter(move |(slot, _)| slot.given.block == block).map(|(slot, bits)| (slot, lock(bits)))
    }

    fn vm(&self) -> &KvmLog {
        self.slots.vm()
    }
}

fn lock(bits: &Mutex<Vec<u64>>) -> MutexGuard<'_, Vec<u64>> {
    bits.locked()
}

impl DirtySource for KvmDirtyLog {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Enables the log of the first slot, reads it and disables it; a write needs a vCPU of the guest and can't be made
    /// here.
    fn probe(&self) -> Result<(), DirtyError> {
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.slots.probe(|slot| {
            let mut bits = vec![0; slot.pages().div_ceil(64) as usize];
            self.vm().get(slot.given.slot, slot.pages(), &mut bits)
        })
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.stop()?;
        let start = || {
            let manual = self.vm().has_manual_protect()?;
            self.manual.store(manual, Ordering::Release);
            if manual {
                self.vm().set_manual_protect(true)?;
            }
            self.handed_out.iter().for_each(|bits| lock(bits).fill(0));
            self.slots.set_logging(true)
        };
        // Set before the first call, so that stop() reverts the earlier calls if a later one fails.
        self.started.store(true, Ordering::Release);
        start().map_err(|error| {
            // The first error is the one to return.
            drop(self.stop());
            DirtyError::kernel(NAME, "switching the log on", error)
        })
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        if !self.started.load(Ordering::Acquire) {
            return Err(DirtyError::kernel(NAME, "sync", io::Error::other("tracking was not started")));
        }
        for (slot, mut bits) in self.slots_of(block) {
            self.vm()
                .get(slot.given.slot, slot.pages(), &mut bits)
                .map_err(|error| DirtyError::kernel(NAME, "KVM_GET_DIRTY_LOG", error))?;
            merge_shifted(into, slot.first(), &bits);
            if !self.manual.load(Ordering::Acquire) {
                bits.fill(0);
            }
        }
        Ok(())
    }

    fn reprotect(&self, run: PageRun) -> Result<(), DirtyError> {
        if !self.manual.load(Ordering::Acquire) {
            return Ok(());
        }
        for (slot, mut handed_out) in self.slots_of(run.block) {
            let pages = slot.pages();
            let first = run.first.0.saturating_sub(slot.first()).min(pages);
            let end = run.end().0.saturating_sub(slot.first()).min(pages);
            if first == end {
                continue;
            }
            // Whole words, as KVM requires. A sync has also handed out the pages of these words outside the run, and
            // they are read later, so clearing them now is as early as clearing them then.
            let words = (first / 64) as usize..end.div_ceil(64) as usize;
            let bits = &mut handed_out[words.clone()];
            if bits.iter().all(|word| *word == 0) {
                continue;
            }
            let from = words.start as u64 * 64;
            let count = u32::try_from(pages.min(words.end as u64 * 64) - from).unwrap_or(u32::MAX);
            self.vm()
                .clear(slot.given.slot, from, count, bits)
                .map_err(|error| DirtyError::kernel(NAME, "KVM_CLEAR_DIRTY_LOG", error))?;
            bits.fill(0);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        if !self.started.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        let mut result = self.slots.set_logging(false);
        if self.manual.swap(false, Ordering::AcqRel) {
            result = result.and(self.vm().set_manual_protect(false));
        }
        result.map_err(|error| DirtyError::kernel(NAME, "switching the log off", error))
    }
}

impl Drop for KvmDirtyLog {
    fn drop(&mut self) {
        // There is no caller to return the error to.
        drop(self.stop());
    }
}

/// ORs `bits`, the first of which is page `first`, into `into`.
fn merge_shifted(into: &mut PageBitmap, first: u64, bits: &[u64]) {
    let (word, shift) = ((first / 64) as usize, first % 64);
    if shift == 0 {
        into.merge_words(word, bits);
        return;
    }
    for (at, bits) in bits.iter().enumerate().filter(|(_, bits)| **bits != 0) {
        into.merge_words(word + at, &[bits << shift, bits >> (64 - shift)]);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::super::tests::machine;
    use super::*;
    use crate::guest::MappedGuest;
    use crate::guest::WrittenPages;
    use crate::guest::race::{Outcome, race_passes};
    use crate::sys::testing::TestVm;
    use crate::units::PageIndex;

    fn outcome(guest: &MappedGuest, vm: TestVm, slots: &[KvmSlot], source: Arc<dyn DirtySource>) -> Outcome {
        source.probe().unwrap();
        let vm = Mutex::new(vm);
        race_passes(guest, &[source], 4, &|pass, _| {
            for slot in slots {
                vm.lock().unwrap().write_pages(slot.guest_addr.0, slot.len / 4096, (pass << 24) as u32);
            }
        })
        .unwrap()
    }

    #[test]
    fn a_racing_vcpu_loses_nothing() {
        let (guest, vm, slots) = machine(|_| ());
        let log = Arc::new(KvmDirtyLog::new(&guest, vm.fd(), &slots).unwrap());
        let outcome = outcome(&guest, vm, &slots, log);
        assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");
    }

    /// A vCPU writes through the process's page tables: write protection alone reports it.
    #[test]
    fn a_racing_vcpu_is_seen_by_write_protection_too() {
        let (guest, vm, slots) = machine(|_| ());
        let outcome = outcome(&guest, vm, &slots, Arc::new(WrittenPages::new(&guest)));
        assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");
    }

    /// A write between the sync and the clearing of its chunk keeps its bit, because only handed-out bits are cleared;
    /// clearing the whole chunk would lose it.
    #[test]
    fn a_write_between_sync_and_reprotect_is_in_the_next_sync() {
        let (guest, mut vm, slots) = machine(|_| ());
        let log = KvmDirtyLog::new(&guest, vm.fd(), &slots).unwrap();
        let chunk = PageRun { block: BlockIndex(0), first: PageIndex(0), pages: 64 };
        for (careless, next) in [(false, vec![6]), (true, vec![])] {
            log.start().unwrap();
            vm.write_pages(0x5000, 1, 1);
            assert_eq!(synced(&log), [5]);
            vm.write_pages(0x6000, 1, 1);
            if careless {
                lock(&log.handed_out[0]).fill(u64::MAX);
            }
            log.reprotect(chunk).unwrap();
            assert_eq!(synced(&log), next, "careless: {careless}");
        }
    }

    fn synced(log: &KvmDirtyLog) -> Vec<u64> {
        let mut map = PageBitmap::new(4096);
        log.sync_into(BlockIndex(0), &mut map).unwrap();
        (0..4096).filter(|page| map.get(PageIndex(*page))).collect()
    }

    #[test]
    fn written_pages_of_both_slots_are_reported_until_cleared() {
        let (guest, mut vm, slots) = machine(|_| ());
        let log = KvmDirtyLog::new(&guest, vm.fd(), &slots).unwrap();
        log.start().unwrap();
        vm.write_pages(0x40_2000, 1, 1); // page 1026, the last of the first slot
        vm.write_pages(0x4000_0000, 2, 1); // pages 1027 and 1028, the first of the second
        assert_eq!(synced(&log), [1026, 1027, 1028]);
        assert_eq!(synced(&log), [1026, 1027, 1028], "nothing was cleared");
        log.reprotect(PageRun { block: BlockIndex(0), first: PageIndex(1024), pages: 64 }).unwrap();
        assert!(synced(&log).is_empty());
        vm.write_pages(0x4000_1000, 1, 2);
        assert_eq!(synced(&log), [1028], "protected again");
        log.stop().unwrap();
        log.stop().unwrap();
        log.start().unwrap();
        assert!(synced(&log).is_empty());
    }

    #[test]
    fn what_is_no_slot_of_the_vm_is_refused() {
        let (guest, vm, slots) = machine(|_| ());
        let with = |change: &dyn Fn(&mut KvmSlot)| {
            let mut slot = slots[1];
            change(&mut slot);
            KvmDirtyLog::new(&guest, vm.fd(), &[slot]).and_then(|log| log.probe()).unwrap_err().to_string()
        };
        assert!(with(&|slot| slot.len += 4096).contains("inside a RAM block"));
        assert!(with(&|slot| slot.offset.0 += 1).contains("whole pages"));
        assert!(with(&|slot| slot.block.0 = 7).contains("inside a RAM block"));
        assert!(with(&|slot| slot.len -= 4096).contains("as the VMM set them"));
        assert!(with(&|slot| slot.slot = 7).contains("as the VMM set them"), "no such slot");
        assert!(with(&|slot| slot.slot = 0).contains("as the VMM set them"), "another slot");
        let nowhere = with(&|slot| (slot.slot, slot.guest_addr.0) = (7, 0x8000_0000));
        assert!(nowhere.contains("no memory at 0x80000000"), "{nowhere}");
        // No slot is left over: the VMM can still use the address.
        let mut vm = vm;
        vm.map(7, 0x8000_0000, guest.region(BlockIndex(0)).unwrap(), 0, 4096);
        let no_vm = KvmDirtyLog::new(&guest, std::fs::File::open("/dev/null").unwrap().into(), &slots);
        assert!(no_vm.unwrap().probe().unwrap_err().to_string().contains("descriptor of the VM"));
    }
}
