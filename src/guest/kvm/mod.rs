//! Pages written by vCPUs, as KVM reports them: the dirty log, and the dirty ring of each vCPU.

mod log;
mod ring;

use std::io;
use std::os::fd::OwnedFd;

pub use log::KvmDirtyLog;
pub use ring::{KvmDirtyRing, RingSize};

use super::{DirtyError, GuestMemory};
use crate::sys::{HostRegion, KvmLog};
use crate::units::{BlockIndex, BlockOffset, GuestAddr, PageSize};

/// KVM counts its logs in base pages of the host.
const LOG_PAGE: PageSize = PageSize::SIZE_4K;
/// `KVM_MEM_LOG_DIRTY_PAGES`.
const LOG_DIRTY_PAGES: u32 = 1;

/// A memory slot as the VMM set it, and the part of a block that it maps into the guest. The slot must exist: KVM has
/// one call for creating a slot and for changing its flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmSlot {
    /// Number of the slot, the address space in the upper 16 bits.
    pub slot: u32,
    /// Where the guest sees it.
    pub guest_addr: GuestAddr,
    /// The block that backs it.
    pub block: BlockIndex,
    /// The offset in the block at which it starts.
    pub offset: BlockOffset,
    /// Length in bytes.
    pub len: u64,
    /// Flags of the slot while no migration runs; the log's flag is added and removed.
    pub flags: u32,
}

#[derive(Debug)]
struct Slot {
    given: KvmSlot,
    region: HostRegion,
}

impl Slot {
    fn pages(&self) -> u64 {
        LOG_PAGE.pages_in(self.given.len)
    }

    /// First page inside the block.
    fn first(&self) -> u64 {
        LOG_PAGE.page_of(self.given.offset).0
    }
}

/// The tracked slots of a VM. For both reporting methods of KVM, a flag of each slot enables and disables it.
#[derive(Debug)]
struct Slots {
    source_name: &'static str,
    vm: KvmLog,
    list: Vec<Slot>,
    page: PageSize,
}

impl Slots {
    fn new(
        source_name: &'static str,
        guest: &dyn GuestMemory,
        vm: OwnedFd,
        slots: &[KvmSlot],
    ) -> Result<Self, DirtyError> {
        let check = |given: &KvmSlot| {
            let in_pages = LOG_PAGE.divides(given.offset.0) && LOG_PAGE.divides(given.len) && given.len > 0;
            let region = guest.region(given.block).filter(|_| in_pages);
            let region = region.filter(|region| region.span(given.offset.0, given.len).is_ok());
            let region = region.ok_or_else(|| {
                let reason =
                    format!("slot {} is not in whole pages inside a RAM block: {given:?}", given.slot);
                DirtyError::Unsupported { source_name, reason }
            })?;
            Ok(Slot { given: *given, region })
        };
        let list = slots.iter().map(check).collect::<Result<_, _>>()?;
        Ok(Self { source_name, vm: KvmLog::new(vm), list, page: guest.table().page() })
    }

    fn vm(&self) -> &KvmLog {
        &self.vm
    }

    fn list(&self) -> &[Slot] {
        &self.list
    }

    fn unsupported(&self, reason: String) -> DirtyError {
        DirtyError::Unsupported { source_name: self.source_name, reason }
    }

    /// Sets the flag of the first slot, lets `check` use it, and clears it. A write needs a vCPU of the guest and can't
    /// be made here.
    fn probe(&self, check: impl FnOnce(&Slot) -> io::Result<()>) -> Result<(), DirtyError> {
        if self.page != LOG_PAGE {
            let reason = format!("KVM counts {LOG_PAGE} pages, the guest {} pages", self.page);
            return Err(self.unsupported(reason));
        }
        self.vm.has_manual_protect().map_err(|error| {
            let remedy = "give the descriptor of the VM, not of /dev/kvm";
            self.unsupported(format!("KVM_CHECK_EXTENSION: {error}; {remedy}"))
        })?;
        let Some(slot) = self.list.first() else { return Ok(()) };
        let refused = |error: io::Error| {
            let remedy = "give the slots as the VMM set them";
            self.unsupported(format!("slot {}: {error}; {remedy}", slot.given.slot))
        };
        self.set_slot(slot, true).map_err(refused)?;
        let checked = check(slot);
        self.set_slot(slot, false).and(checked).map_err(refused)
    }

    /// Sets or clears the flag of every slot. Clearing continues after an error, of which the first is returned.
    fn set_logging(&self, on: bool) -> io::Result<()> {
        if on {
            return self.list.iter().try_for_each(|slot| self.set_slot(slot, true));
        }
        let mut result = Ok(());
        for slot in &self.list {
            result = result.and(self.set_slot(slot, false));
        }
        result
    }

    fn set_slot(&self, slot: &Slot, on: bool) -> io::Result<()> {
        let KvmSlot { slot: number, guest_addr, offset, len, flags, .. } = slot.given;
        let flags = if on { flags | LOG_DIRTY_PAGES } else { flags };
        let memory = slot.region.span(offset.0, len).map_err(io::Error::other)?;
        let page = slot.region.span(offset.0, LOG_PAGE.bytes()).map_err(io::Error::other)?;
        if on && !self.vm.has_memory_at(number, guest_addr.0, page)? {
            return Err(io::Error::other(format!("the VM has no memory at {:#x}", guest_addr.0)));
        }
        self.vm.set_slot(number, guest_addr.0, memory, flags)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::MappedGuest;
    use crate::guest::race::guest_of;
    use crate::sys::Mapping;
    use crate::sys::testing::TestVm;

    /// One block in two slots that meet at an odd page and are far apart in the guest's address space, and a block of
    /// one page.
    pub(super) fn machine(prepare: impl FnOnce(OwnedFd)) -> (MappedGuest, TestVm, Vec<KvmSlot>) {
        let guest = guest_of(&[Mapping::anonymous(16 << 20).unwrap(), Mapping::memfd("b1", 4096).unwrap()]);
        let slot = |slot, at, block, first: u64, pages: u64| KvmSlot {
            slot,
            guest_addr: GuestAddr(at),
            block: BlockIndex(block),
            offset: BlockOffset(first * 4096),
            len: pages * 4096,
            flags: 0,
        };
        let slots =
            vec![slot(0, 0, 0, 0, 1027), slot(1, 0x4000_0000, 0, 1027, 3069), slot(2, 0x1000_0000, 1, 0, 1)];
        let mut vm = TestVm::prepared(prepare);
        for given in &slots {
            let region = guest.region(given.block).unwrap();
            vm.map(given.slot, given.guest_addr.0, region, given.offset.0, given.len);
        }
        (guest, vm, slots)
    }
}
