//! Memory slots of a KVM virtual machine, which are removed before their memory is unmapped.
//!
//! # Source
//! The kernel's virt/kvm/api: KVM_SET_USER_MEMORY_REGION.

use std::io;
use std::os::fd::OwnedFd;

use super::{HostRegion, KvmLog};

/// The memory slots of a VM that were created here. Each keeps its memory mapped; dropping this removes the slots.
#[derive(Debug)]
pub struct KvmMemory {
    vm: KvmLog,
    made: Vec<(u32, u64, HostRegion)>,
}

impl KvmMemory {
    /// No slot yet. `vm` is a (duplicated) descriptor of the VM.
    pub fn new(vm: OwnedFd) -> Self {
        Self { vm: KvmLog::new(vm), made: Vec::new() }
    }

    /// Maps `len` bytes of `region` from `offset` on into the guest at `guest_addr`, as slot number `slot`.
    ///
    /// # Errors
    /// InvalidInput outside the region; EEXIST if the slot or the addresses are in use; EINVAL for less than whole
    /// pages.
    pub fn add(
        &mut self,
        slot: u32,
        guest_addr: u64,
        region: &HostRegion,
        offset: u64,
        len: u64,
    ) -> io::Result<()> {
        let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidInput, why);
        let span = region.span(offset, len).map_err(|error| invalid(error.to_string()))?;
        if len == 0 || self.made.iter().any(|(made, ..)| *made == slot) {
            return Err(invalid(format!("slot {slot} has no bytes, or is made already")));
        }
        self.vm.set_slot(slot, guest_addr, span, 0)?;
        self.made.push((slot, guest_addr, region.clone()));
        Ok(())
    }
}

impl Drop for KvmMemory {
    fn drop(&mut self) {
        for (slot, guest_addr, region) in self.made.drain(..) {
            let none = region.span(0, 0).map(|span| self.vm.set_slot(slot, guest_addr, span, 0));
            if !matches!(none, Ok(Ok(()))) {
                // The guest may still access the memory: it stays mapped permanently.
                std::mem::forget(region);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::{Mapping, duplicate};

    #[test]
    fn memory_is_the_guests_until_it_is_dropped() {
        let vm = kvm_ioctls::Kvm::new().unwrap().create_vm().unwrap();
        let new = || KvmMemory::new(duplicate(&vm).unwrap());
        let ram = Mapping::anonymous(16 * 4096).unwrap();
        let (mut memory, mut other) = (new(), new());
        memory.add(0, 0, ram.region(), 4096, 8 * 4096).unwrap();
        assert!(memory.add(0, 0x10_0000, ram.region(), 0, 4096).is_err(), "the slot exists");
        assert!(memory.add(1, 0x10_0000, ram.region(), 4096, 16 * 4096).is_err(), "outside the region");
        assert!(memory.add(1, 0x10_0000, ram.region(), 0, 100).is_err(), "not in whole pages");
        assert_eq!(
            other.add(1, 0x2000, ram.region(), 0, 4096).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        drop(memory);
        other.add(1, 0x2000, ram.region(), 0, 4096).unwrap();
    }
}
