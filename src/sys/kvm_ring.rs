//! The dirty rings of a KVM virtual machine: one for each vCPU, which the kernel fills with the pages that the vCPU
//! wrote.
//!
//! # Source
//! The kernel's virt/kvm/api: KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_RESET_DIRTY_RINGS. A ring is
//! mapped over the vCPU's descriptor from page `KVM_DIRTY_LOG_PAGE_OFFSET` on.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_dirty_gfn,
    kvm_enable_cap,
};
use memmap2::{MmapOptions, MmapRaw};
use rustix::ioctl::{Opcode, opcode};

use super::KvmLog;

const RESET_DIRTY_RINGS: Opcode = opcode::none(KVMIO as u8, 0xc7);
const ENTRY: u32 = size_of::<kvm_dirty_gfn>() as u32;
/// Bit 0 of an entry's flags: the kernel has filled it in.
const DIRTY: u32 = 1;
/// Bit 1: the entry was taken, and the next reset may protect its page again.
const RESET: u32 = 2;

impl KvmLog {
    /// Maximum number of entries of a vCPU's ring; 0 if this kernel has no rings.
    pub(crate) fn max_ring_entries(&self) -> u32 {
        let bytes = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING].map(|cap| self.check(cap));
        bytes.into_iter().find_map(|bytes| bytes.ok().filter(|bytes| *bytes > 0)).unwrap_or(0) / ENTRY
    }

    /// Gives each vCPU that is created later a ring of `entries`, a power of two.
    ///
    /// # Errors
    /// EINVAL if the VM has a vCPU already, has rings already, or for another number.
    pub(crate) fn enable_rings(&self, entries: u32) -> io::Result<()> {
        // An old kernel on x86 has only the first capability; there, loads and stores are ordered anyway.
        let ordered = self.check(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).is_ok_and(|bytes| bytes > 0);
        let cap = if ordered { KVM_CAP_DIRTY_LOG_RING_ACQ_REL } else { KVM_CAP_DIRTY_LOG_RING };
        let mut enable = kvm_enable_cap { cap, ..Default::default() };
        enable.args[0] = u64::from(entries) * u64::from(ENTRY);
        self.enable(&enable)
    }

    /// Protects the pages of all entries that were taken, and lets the kernel fill these entries again.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn reset_rings(&self) -> io::Result<()> {
        // SAFETY: the call has no argument and touches no memory of ours but the entries' flags, which we touch by
        // atomic operations only.
        let answer = unsafe { libc::ioctl(self.raw(), RESET_DIRTY_RINGS as _, 0) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// The ring of one vCPU, read by one thread at a time.
#[derive(Debug)]
pub(crate) struct DirtyRing {
    map: MmapRaw,
    entries: u32,
    next: u32,
    /// Keeps the vCPU of this ring open.
    _vcpu: OwnedFd,
}

impl DirtyRing {
    /// Maps the ring of a vCPU, given by its (duplicated) descriptor. `entries` is the number passed to
    /// [`enable_rings`](KvmLog::enable_rings).
    ///
    /// # Errors
    /// EINVAL if the descriptor is no vCPU with a ring of this size.
    pub(crate) fn new(vcpu: OwnedFd, entries: u32) -> io::Result<Self> {
        let offset = u64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * rustix::param::page_size() as u64;
        let bytes =
            entries.checked_mul(ENTRY).filter(|bytes| *bytes > 0).ok_or(io::ErrorKind::InvalidInput)?;
        let map = MmapOptions::new().offset(offset).len(bytes as usize).map_raw(vcpu.as_raw_fd())?;
        Ok(Self { map, entries, next: 0, _vcpu: vcpu })
    }

    /// Takes the entries that the kernel has filled in and calls `each` with the slot and the page inside it. Returns
    /// how many there were. Their pages stay unprotected until [`reset_rings`](KvmLog::reset_rings).
    pub(crate) fn take(&mut self, mut each: impl FnMut(u32, u64)) -> u64 {
        // At most one pass over the ring, so that a vCPU that keeps writing can't keep this loop running.
        for taken in 0..u64::from(self.entries) {
            let (entry, flags) = self.entry(self.next);
            if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return taken;
            }
            // SAFETY: between DIRTY and RESET the entry is ours: the kernel does not write it, and the load above saw
            // what it wrote before.
            let (slot, page) =
                unsafe { ((&raw const (*entry).slot).read(), (&raw const (*entry).offset).read()) };
            each(slot, page);
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
        }
        u64::from(self.entries)
    }

    /// Entries the ring has.
    pub(crate) fn entries(&self) -> u32 {
        self.entries
    }

    /// True if at least half of the entries wait to be taken.
    pub(crate) fn is_half_full(&self) -> bool {
        let (_, flags) = self.entry(self.next.wrapping_add(self.entries / 2));
        flags.load(Ordering::Relaxed) & (DIRTY | RESET) == DIRTY
    }

    /// An entry and its flags. Numbers only increase (the length divides 2^32).
    fn entry(&self, number: u32) -> (*mut kvm_dirty_gfn, &AtomicU32) {
        let at = (number % self.entries) as usize;
        // SAFETY: `at` is below the number of entries that the mapping holds; it is page aligned and lives as long as
        // `self`. No reference to an entry is made.
        let entry = unsafe { self.map.as_mut_ptr().cast::<kvm_dirty_gfn>().add(at) };
        // SAFETY: the flags are four aligned bytes inside the entry, mapped as long as `self`; the kernel and we touch them
        // by atomic operations only.
        (entry, unsafe { AtomicU32::from_ptr(&raw mut (*entry).flags) })
    }
}
