//! The dirty log of a KVM virtual machine.
//!
//! # Source
//! The kernel's virt/kvm/api: KVM_GET_DIRTY_LOG, KVM_CLEAR_DIRTY_LOG, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
//! KVM_SET_USER_MEMORY_REGION. The descriptor is that of the VM; any crate may have created it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_NR_MEMSLOTS, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVMIO,
    kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
    kvm_enable_cap, kvm_userspace_memory_region,
};
use rustix::ioctl::{Opcode, opcode};

use super::HostSpan;

/// The part of a slot's number that is its address space.
const ADDRESS_SPACE: u32 = 0xffff_0000;
const IO: u8 = KVMIO as u8;
const CHECK_EXTENSION: Opcode = opcode::none(IO, 0x03);
const GET_DIRTY_LOG: Opcode = opcode::write::<kvm_dirty_log>(IO, 0x42);
const SET_USER_MEMORY_REGION: Opcode = opcode::write::<kvm_userspace_memory_region>(IO, 0x46);
const ENABLE_CAP: Opcode = opcode::write::<kvm_enable_cap>(IO, 0xa3);
const CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<kvm_clear_dirty_log>(IO, 0xc0);

/// The VM descriptor, for its dirty log.
#[derive(Debug)]
pub(crate) struct KvmLog {
    vm: OwnedFd,
}

impl KvmLog {
    /// A log over a (duplicated) descriptor of a VM.
    pub(crate) fn new(vm: OwnedFd) -> Self {
        Self { vm }
    }

    /// True if pages can be cleared and protected chunk by chunk.
    ///
    /// # Errors
    /// ENOTTY if the descriptor is no VM.
    pub(crate) fn has_manual_protect(&self) -> io::Result<bool> {
        let flags = self.check(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2)?;
        Ok(flags & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0)
    }

    /// KVM's answer for a capability; 0 if the VM does not have it.
    ///
    /// # Errors
    /// ENOTTY if the descriptor is no VM.
    pub(super) fn check(&self, capability: u32) -> io::Result<u32> {
        // SAFETY: the call takes a number and touches no memory of ours.
        let answer = unsafe { libc::ioctl(self.raw(), CHECK_EXTENSION as _, u64::from(capability)) };
        u32::try_from(answer).map_err(|_| io::Error::last_os_error())
    }

    /// Enables a capability.
    ///
    /// # Errors
    /// The kernel's error.
    pub(super) fn enable(&self, capability: &kvm_enable_cap) -> io::Result<()> {
        // SAFETY: KVM_ENABLE_CAP reads one struct kvm_enable_cap.
        self.call(unsafe { libc::ioctl(self.raw(), ENABLE_CAP as _, capability) })
    }

    pub(super) fn raw(&self) -> RawFd {
        self.vm.as_raw_fd()
    }

    /// With `on`, reading the log does not change bits and protection until [`clear`](Self::clear).
    ///
    /// # Errors
    /// EINVAL where [`has_manual_protect`](Self::has_manual_protect) is false.
    pub(crate) fn set_manual_protect(&self, on: bool) -> io::Result<()> {
        let mut cap = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        cap.args[0] = u64::from(on) * u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE);
        self.enable(&cap)
    }

    /// True if the VM has memory at `guest_addr`, in the address space of `slot`. KVM has no call for this. A slot of
    /// the `page`, under the last slot number, can't be created where another slot is; if it can, it is removed again.
    ///
    /// # Errors
    /// EINVAL if the VMM uses the last number itself; the kernel's error.
    pub(crate) fn has_memory_at(&self, slot: u32, guest_addr: u64, page: HostSpan<'_>) -> io::Result<bool> {
        let last = self.check(KVM_CAP_NR_MEMSLOTS)?.saturating_sub(1);
        let mut probe = kvm_userspace_memory_region {
            slot: (slot & ADDRESS_SPACE) | last,
            flags: 0,
            guest_phys_addr: guest_addr,
            memory_size: page.len() as u64,
            userspace_addr: page.address() as u64,
        };
        // SAFETY: the call reads one struct. If it makes a slot, its memory stays mapped as long as `page`, and the
        // slot is gone before this returns.
        let made = self.call(unsafe { libc::ioctl(self.raw(), SET_USER_MEMORY_REGION as _, &probe) });
        match made {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(true),
            Err(error) => Err(error),
            Ok(()) => {
                probe.memory_size = 0;
                // SAFETY: the call reads one struct; it removes what was made above.
                let gone = unsafe { libc::ioctl(self.raw(), SET_USER_MEMORY_REGION as _, &probe) };
                self.call(gone).map(|()| false)
            }
        }
    }

    /// Creates a slot, or sets the flags of one that is already mapped at `guest_addr` over `memory`
    /// ([`has_memory_at`](Self::has_memory_at)); without `memory` it removes the slot. A caller that creates a slot
    /// keeps its memory mapped until the slot is removed.
    ///
    /// # Errors
    /// EINVAL or EEXIST if the slot differs from its description.
    pub(crate) fn set_slot(
        &self,
        slot: u32,
        guest_addr: u64,
        memory: HostSpan<'_>,
        flags: u32,
    ) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: guest_addr,
            memory_size: memory.len() as u64,
            userspace_addr: memory.address() as u64,
        };
        // SAFETY: the call reads one struct. KVM refuses to change a slot's size or memory in place, and to make or
        // move one to an address that is taken. So the guest sees the memory that its VMM gave it, for as long as the
        // VMM promised; KvmMemory keeps the memory of its own slots mapped.
        self.call(unsafe { libc::ioctl(self.raw(), SET_USER_MEMORY_REGION as _, &region) })
    }

    /// Reads the log of a slot of `pages` 4 KiB pages into `bits`, which must have a bit for each.
    ///
    /// # Errors
    /// ENOENT if the slot has no log; EINVAL if `bits` is too short.
    ///
    /// `pages` must be the number of the slot's pages: the caller has set the slot's flags with that length before,
    /// which KVM refuses for any other length.
    pub(crate) fn get(&self, slot: u32, pages: u64, bits: &mut [u64]) -> io::Result<()> {
        if (bits.len() as u64) < pages.div_ceil(64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let log = kvm_dirty_log {
            slot,
            padding1: 0,
            __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
        };
        // SAFETY: KVM writes a bit for each page of the slot, rounded up to 64; `bits` holds `pages`, which is
        // the slot's number by the contract above.
        self.call(unsafe { libc::ioctl(self.raw(), GET_DIRTY_LOG as _, &log) })
    }

    /// Clears the set bits among `pages` pages from `first` and protects those pages again. `first` is a
    /// multiple of 64; `pages` too, or reaches the end of the slot.
    ///
    /// # Errors
    /// EINVAL for other ranges, or without manual protection.
    pub(crate) fn clear(&self, slot: u32, first: u64, pages: u32, bits: &mut [u64]) -> io::Result<()> {
        if (bits.len() as u64) < u64::from(pages).div_ceil(64) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let clear = kvm_clear_dirty_log {
            slot,
            num_pages: pages,
            first_page: first,
            __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 { dirty_bitmap: bits.as_mut_ptr().cast() },
        };
        // SAFETY: KVM reads a bit for each of `pages`, rounded up to 64, all inside `bits`.
        self.call(unsafe { libc::ioctl(self.raw(), CLEAR_DIRTY_LOG as _, &clear) })
    }

    fn call(&self, answer: i32) -> io::Result<()> {
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
