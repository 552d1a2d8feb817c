//! Pages written by vCPUs: KVM's dirty rings.
//!
//! The kernel puts each page that a vCPU writes into that vCPU's ring, so the cost of a sync depends on the number of
//! written pages instead of the size of the guest, and it is known which vCPU wrote. It reports the same writes as
//! [`KvmDirtyLog`](super::KvmDirtyLog): those by vCPUs, and by KVM itself on their behalf.
//!
//! # A full ring
//!
//! A vCPU whose ring is full leaves KVM_RUN with KVM_EXIT_DIRTY_RING_FULL and can't continue before the VMM has emptied
//! the ring: its thread calls [`KvmDirtyRing::collect`] and runs again.
//!
//! The kernel keeps a reserve in each ring for the writes of a vCPU until it can be stopped. If KVM emulates the
//! guest's instructions, it makes an entry for each store and does not check the ring before the next exit to the VMM,
//! so that the reserve can overflow. [`collect`](KvmDirtyRing::collect) detects this and returns an error; a call of
//! [`relieve`](KvmDirtyRing::relieve) at each exit prevents it.
//!
//! # Required order
//!
//! Entries are taken, then their pages protected again (one reset for all), then a sync hands the pages out, then their
//! bytes are read. A write before the reset is in those bytes; one after it makes a new entry. If the processor logs
//! writes into a buffer of its own (Intel's page-modification logging), the entries are made when the vCPU leaves the
//! guest. So the last sync follows a pause, in which each vCPU leaves it.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{KvmSlot, Slots};
use crate::guest::{DirtyError, DirtySource, GuestMemory};
use crate::ram::{AtomicBitmap, PageBitmap};
use crate::sys::{DirtyRing, KvmLog, Lock as _};
use crate::units::{BlockIndex, PageIndex};

const NAME: &str = "kvm-ring";
/// The kernel reserves some entries for what the processor has logged when a vCPU stops (64, and 512 with page
/// modification logging): a ring must be longer than that.
const FEWEST: u32 = 1024;

/// The length of a VM's dirty rings; it proves that they were enabled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingSize(u32);

impl RingSize {
    /// Gives every vCPU that the VM of `vm` will have a ring of `entries`, rounded up to a power of two and limited to
    /// between 1024 and the kernel's maximum (65536 is common). Must be called before the first vCPU is created. The
    /// VM's dirty log can't be read any more.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] with the reason: no rings in this kernel, or a vCPU that exists.
    pub fn enable(vm: OwnedFd, entries: u32) -> Result<Self, DirtyError> {
        let vm = KvmLog::new(vm);
        let most = vm.max_ring_entries();
        if most < FEWEST {
            let remedy = "use the dirty log, or a kernel from 5.11 on";
            return Err(DirtyError::unsupported(
                NAME,
                format!("KVM_CAP_DIRTY_LOG_RING is not offered; {remedy}"),
            ));
        }
        let entries = entries.clamp(FEWEST, 1 << most.ilog2()).next_power_of_two();
        vm.enable_rings(entries).map_err(|error| {
            let remedy = "enable the rings once, before the first vCPU is made";
            DirtyError::unsupported(NAME, format!("KVM_ENABLE_CAP of {entries} entries: {error}; {remedy}"))
        })?;
        Ok(Self(entries))
    }

    /// Entries of each ring.
    pub fn entries(self) -> u32 {
        self.0
    }
}

/// Dirty source over the rings of a KVM VM's vCPUs.
#[derive(Debug)]
pub struct KvmDirtyRing {
    slots: Slots,
    rings: Mutex<Vec<DirtyRing>>,
    /// Pages each vCPU has written.
    written: Vec<AtomicU64>,
    /// Pages taken from the rings and not yet handed out, one map for each block.
    pending: Vec<AtomicBitmap>,
    started: AtomicBool,
}

impl KvmDirtyRing {
    /// Tracks `slots` of the VM of the (duplicated) descriptor `vm` by the rings of all its `vcpus`. While tracking is
    /// on, the VMM must not change these slots.
    ///
    /// # Errors
    /// [`DirtyError::Unsupported`] for a slot that is not in whole pages inside its block, or a vCPU without a ring.
    pub fn new(
        guest: &dyn GuestMemory,
        vm: OwnedFd,
        slots: &[KvmSlot],
        vcpus: impl IntoIterator<Item = OwnedFd>,
        size: RingSize,
    ) -> Result<Self, DirtyError> {
        let map = |(number, vcpu): (usize, OwnedFd)| {
            DirtyRing::new(vcpu, size.0).map_err(|error| {
                DirtyError::unsupported(
                    NAME,
                    format!("the ring of vCPU {number}: {error}; give the descriptors of its vCPUs"),
                )
            })
        };
        let rings = vcpus.into_iter().enumerate().map(map).collect::<Result<Vec<_>, _>>()?;
        let table = guest.table();
        Ok(Self {
            slots: Slots::new(NAME, guest, vm, slots)?,
            written: rings.iter().map(|_| AtomicU64::new(0)).collect(),
            rings: Mutex::new(rings),
            pending: table.blocks().iter().map(|block| AtomicBitmap::new(table.pages_of(block))).collect(),
            started: false.into(),
        })
    }

    /// Empties all rings; their pages go to the next sync. A vCPU's thread calls it after KVM_EXIT_DIRTY_RING_FULL, and
    /// may then run the vCPU again; any thread may call it at any time. Returns the number of entries.
    ///
    /// # Errors
    /// [`DirtyError::Kernel`]; the vCPU must not continue.
    pub fn collect(&self) -> Result<u64, DirtyError> {
        let mut rings = self.rings.locked();
        let mut taken = 0;
        let mut overrun = None;
        for (vcpu, (ring, written)) in rings.iter_mut().zip(&self.written).enumerate() {
            let mut pages = 0;
            let entries = ring.take(|slot, page| pages += self.note(slot, page));
            written.fetch_add(pages, Ordering::Relaxed);
            taken += entries;
            // Within its reserve the kernel never uses the last free entry.
            overrun = overrun.or((entries == u64::from(ring.entries())).then_some(vcpu));
        }
        if taken > 0 {
            self.slots
                .vm()
                .reset_rings()
                .map_err(|error| DirtyError::kernel(NAME, "KVM_RESET_DIRTY_RINGS", error))?;
        }
        match overrun {
            None => Ok(taken),
            Some(vcpu) => {
                let why = format!("the ring of vCPU {vcpu} was overrun, pages are lost; enable longer rings");
                Err(DirtyError::kernel(NAME, "collecting", io::Error::other(why)))
            }
        }
    }

    /// As [`collect`](Self::collect) if a ring is at least half full; otherwise it only checks each ring. A vCPU's
    /// thread calls it after any exit, so that its ring is rarely full.
    ///
    /// # Errors
    /// As [`collect`](Self::collect).
    pub fn collect_if_half_full(&self) -> Result<u64, DirtyError> {
        // The holder of the lock is collecting.
        let half_full = self.rings.try_lock().is_ok_and(|rings| rings.iter().any(DirtyRing::is_half_full));
        if half_full { self.collect() } else { Ok(0) }
    }

    /// Pages that each vCPU has written while tracking was on, in the order of the given vCPUs; the numbers only grow.
    /// A page counts once between two syncs, for the vCPU whose write was found first.
    pub fn pages_written(&self) -> Vec<u64> {
        self.written.iter().map(|written| written.load(Ordering::Relaxed)).collect()
    }

    /// Marks a page; 1 if it was not marked yet.
    fn note(&self, slot: u32, page: u64) -> u64 {
        // There are few slots. A slot that the VMM logs for another purpose is not reported here.
        let tracked = self.slots.list().iter().find(|tracked| tracked.given.slot == slot);
        let Some(tracked) = tracked.filter(|tracked| page < tracked.pages()) else { return 0 };
        let map = self.pending.get(tracked.given.block.as_usize());
        map.map_or(0, |map| map.set(PageIndex(tracked.first() + page), 1))
    }

    fn forget_pending(&self) {
        for map in &self.pending {
            map.take_into(&mut PageBitmap::new(map.len()));
        }
    }
}

impl DirtySource for KvmDirtyRing {
    fn name(&self) -> &'static str {
        NAME
    }

    /// Enabling the rings has already shown that the kernel has them. Enables and disables the log of the first slot.
    fn probe(&self) -> Result<(), DirtyError> {
        if self.started.load(Ordering::Acquire) {
            return Ok(());
        }
        self.slots.probe(|_| self.slots.vm().reset_rings())
    }

    fn start(&self) -> Result<(), DirtyError> {
        self.stop()?;
        // Set before the first call, so that stop() reverts the earlier calls if a later one fails.
        self.started.store(true, Ordering::Release);
        self.slots.set_logging(true).map_err(|error| {
            // The first error is the one to return.
            drop(self.stop());
            DirtyError::kernel(NAME, "switching the log on", error)
        })
    }

    fn begin_sync(&self) -> Result<(), DirtyError> {
        if !self.started.load(Ordering::Acquire) {
            return Err(DirtyError::kernel(NAME, "sync", io::Error::other("tracking was not started")));
        }
        self.collect().map(drop)
    }

    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        if let Some(map) = self.pending.get(block.as_usize()) {
            map.take_into(into);
        }
        Ok(())
    }

    fn stop(&self) -> Result<(), DirtyError> {
        let mut result = Ok(());
        if self.started.swap(false, Ordering::AcqRel) {
            result = self
                .slots
                .set_logging(false)
                .map_err(|error| DirtyError::kernel(NAME, "switching the log off", error));
        }
        // Remaining entries of the rings belong to the migration that ends; a full ring must not stop its vCPU later.
        result = result.and(self.collect().map(drop));
        self.forget_pending();
        result
    }
}

impl Drop for KvmDirtyRing {
    fn drop(&mut self) {
        // There is no caller to return the error to.
        drop(self.stop());
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::super::tests::machine;
    use super::*;
    use crate::guest::MappedGuest;
    use crate::guest::race::race_passes;
    use crate::sys::duplicate;
    use crate::sys::testing::TestVm;

    const ENTRIES: u32 = 1024;

    /// The machine of the log's tests with rings of [`ENTRIES`].
    fn tracked() -> (MappedGuest, TestVm, Vec<KvmSlot>, Arc<KvmDirtyRing>) {
        let mut size = None;
        let (guest, vm, slots) = machine(|vm| size = Some(RingSize::enable(vm, ENTRIES).unwrap()));
        let ring = KvmDirtyRing::new(&guest, vm.fd(), &slots, [vm.vcpu_fd()], size.unwrap()).unwrap();
        ring.probe().unwrap();
        (guest, vm, slots, Arc::new(ring))
    }

    fn synced(ring: &KvmDirtyRing) -> Vec<u64> {
        let mut map = PageBitmap::new(4096);
        ring.begin_sync().unwrap();
        ring.sync_into(BlockIndex(0), &mut map).unwrap();
        (0..4096).filter(|page| map.get(PageIndex(*page))).collect()
    }

    /// Writers race with syncs; each pass writes four times as many pages as the ring holds. Either a sync empties it,
    /// or the vCPU's thread once it is full.
    #[test]
    fn a_racing_vcpu_loses_nothing_whoever_empties_its_ring() {
        let (guest, vm, slots, ring) = tracked();
        let vm = Mutex::new(vm);
        let sources: [Arc<dyn DirtySource>; 1] = [ring.clone()];
        let outcome = race_passes(&guest, &sources, 4, &|pass, _| {
            for slot in &slots {
                vm.lock().unwrap().write_pages_with(
                    slot.guest_addr.0,
                    slot.len / 4096,
                    (pass << 24) as u32,
                    &mut || {
                        ring.collect().unwrap();
                    },
                );
            }
        })
        .unwrap();
        assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");
        assert!(ring.pages_written()[0] >= 4 * 4097, "{:?}", ring.pages_written());
    }

    #[test]
    fn a_ring_relieved_at_each_exit_is_never_full() {
        let (_guest, mut vm, _slots, ring) = tracked();
        ring.start().unwrap();
        let mut most = 0;
        for first in (0..3069).step_by(31) {
            let pages = 31.min(3069 - first);
            vm.write_pages(0x4000_0000 + first * 4096, pages, 1);
            most = most.max(ring.collect_if_half_full().unwrap());
        }
        assert!((512..1024 - 64).contains(&most), "{most}");
        assert_eq!(synced(&ring), (1027..4096).collect::<Vec<_>>());
    }

    /// A ring without a free entry may have lost some: this is reported, and the ring is not trusted.
    #[test]
    fn an_overrun_ring_is_told() {
        let (_guest, mut vm, _slots, ring) = tracked();
        ring.start().unwrap();
        // If KVM executes the guest instead of emulating it, it stops the vCPU in time.
        let mut stopped_in_time = false;
        let mut told = Ok(0);
        vm.run_pages(0x4000_0000, 1024, 1, &mut || {
            told = ring.collect();
            stopped_in_time |= told.is_ok();
        });
        if !stopped_in_time {
            let told = told.and_then(|_| ring.begin_sync()).unwrap_err();
            let told = crate::error::Chain(&told).to_string();
            assert!(told.contains("vCPU 0 was overrun"), "{told}");
        }
    }

    #[test]
    fn a_full_ring_is_emptied_by_the_vcpus_thread_and_its_pages_are_in_the_next_sync() {
        let (_guest, mut vm, _slots, ring) = tracked();
        ring.start().unwrap();
        let (mut stops, mut taken) = (0, 0);
        vm.write_pages_with(0x4000_0000, 3069, 1, &mut || {
            stops += 1;
            taken += ring.collect().unwrap();
        });
        assert!(stops >= 3069 / u64::from(ENTRIES), "{stops} stops");
        assert!(taken < 3069, "the rest is in the ring still");
        assert_eq!(synced(&ring), (1027..4096).collect::<Vec<_>>());
        assert!(synced(&ring).is_empty());
        assert_eq!(ring.pages_written(), [3069]);
    }

    /// A write after the sync makes a new entry only because the sync protected the page again.
    #[test]
    fn a_page_is_reported_again_when_it_is_written_again() {
        let (_guest, mut vm, _slots, ring) = tracked();
        assert!(ring.begin_sync().is_err(), "not started");
        ring.start().unwrap();
        vm.write_pages(0x5000, 1, 1);
        vm.write_pages(0x5000, 1, 2);
        assert_eq!((synced(&ring), synced(&ring)), (vec![5], vec![]));
        vm.write_pages(0x5000, 1, 3);
        vm.write_pages(0x4000_0000, 1, 3);
        assert_eq!(synced(&ring), [5, 1027]);
        vm.write_pages(0x6000, 1, 4);
        ring.stop().unwrap();
        ring.stop().unwrap();
        vm.write_pages(0x0, 1027, 5); // Longer than the ring: nothing is logged any more.
        ring.start().unwrap();
        assert!(synced(&ring).is_empty(), "what was written before belongs to nobody");
        vm.write_pages(0x7000, 1, 6);
        assert_eq!(synced(&ring), [7], "and the log is on again");
    }

    #[test]
    fn what_has_no_ring_is_refused_with_the_reason() {
        let (guest, vm, slots, ring) = tracked();
        let again = RingSize::enable(vm.fd(), ENTRIES).unwrap_err().to_string();
        assert!(again.contains("before the first vCPU"), "{again}");
        let size = RingSize(ENTRIES);
        let of =
            |fd: OwnedFd| KvmDirtyRing::new(&guest, vm.fd(), &slots, [fd], size).unwrap_err().to_string();
        assert!(of(vm.fd()).contains("the ring of vCPU 0"));
        let null = std::fs::File::open("/dev/null").unwrap();
        let no_vm = RingSize::enable(duplicate(&null).unwrap(), ENTRIES).unwrap_err().to_string();
        assert!(no_vm.contains("KVM_CAP_DIRTY_LOG_RING"), "{no_vm}");
        drop(ring);
        let odd = KvmSlot { len: 4095, ..slots[0] };
        let odd = KvmDirtyRing::new(&guest, vm.fd(), &[odd], [vm.vcpu_fd()], size).unwrap_err();
        assert!(odd.to_string().contains("whole pages"), "{odd}");
    }
}
