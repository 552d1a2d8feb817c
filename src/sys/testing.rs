//! Setup of the machine that several test modules need.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[cfg(feature = "kvm")]
use std::os::fd::OwnedFd;

use std::io::{self, Write as _};
use std::ptr::NonNull;
use std::sync::Arc;

use super::{HostRegion, Mapping, MappingError, MissingFaults, MissingFaultsError};
#[cfg(feature = "kvm")]
use super::{KvmMemory, duplicate};
use crate::units::PageSize;

/// True if the kernel knows huge pages of `page`, of which it may then [allocate](huge_pages) `pages`. Otherwise the calling
/// test says what it lacks: qemu-user's Linux refuses the flags of mmap(2) and memfd_create(2).
pub(crate) fn has_huge_pages(page: PageSize, pages: u64) -> bool {
    let unknown = |tried: Result<Mapping, MappingError>| match tried {
        Err(MappingError::HugePages { source, .. }) if is_refused(&source) => Some(source),
        _ => None,
    };
    let refused = unknown(Mapping::anonymous_huge(page.bytes(), page))
        .or_else(|| unknown(Mapping::memfd_huge("probe", page.bytes(), page)));
    match refused {
        Some(error) => lacks("huge-pages", &error),
        None => {
            huge_pages(page, pages);
            true
        }
    }
}

/// True if the kernel has userfaultfd(2), whether or not this process may use it.
pub(crate) fn has_userfaultfd() -> bool {
    match MissingFaults::user_mode_only() {
        Err(MissingFaultsError::Kernel { source, .. }) if is_refused(&source) => {
            lacks("userfaultfd", &source)
        }
        _ => true,
    }
}

/// True if MADV_REMOVE takes pages of a memfd away. qemu-user says that it has, and leaves them.
pub(crate) fn has_holes() -> bool {
    let mapping = Mapping::memfd("probe", 4096).expect("a memfd");
    let mut byte = [1];
    let span = mapping.region().span(0, 1).expect("its first byte");
    span.copy_from(&byte);
    let page = mapping.region().span(0, 4096).expect("its page");
    super::discard(page, PageSize::SIZE_4K).expect("a hole");
    span.copy_to(&mut byte);
    byte == [0] || lacks("holes", &io::Error::other("MADV_REMOVE had no effect"))
}

/// The kernel does not know the call or its flags.
fn is_refused(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS))
}

/// Says that a test, or a part of it, is skipped, past the capture of a test's output. A failure where `CI=true`, unless
/// `RAMWIRE_MAY_LACK` names `what`.
fn lacks(what: &str, error: &io::Error) -> bool {
    let named = std::env::var("RAMWIRE_MAY_LACK").unwrap_or_default();
    let may = named.split(',').any(|named| named == what);
    let strict = std::env::var("CI").as_deref() == Ok("true");
    assert!(
        may || !strict,
        "with CI=true this may be skipped only if RAMWIRE_MAY_LACK names {what}: {error}"
    );
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(io::stderr(), "SKIPPED: {test}: this kernel has no {what}: {error}");
    false
}

/// Lets the kernel allocate `pages` huge pages on demand, as an administrator does before starting VMs with them. Only
/// ever raises the limit; needs root once after a boot.
pub(crate) fn huge_pages(page: PageSize, pages: u64) {
    let kib = page.bytes() / 1024;
    let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_overcommit_hugepages");
    let now: u64 = std::fs::read_to_string(&path).unwrap().trim().parse().unwrap();
    if now < pages {
        std::fs::write(&path, pages.to_string())
            .unwrap_or_else(|error| panic!("{error}; as root: echo {pages} > {path}"));
    }
}

/// Memory that can be read but has no pages to reference, like a device's: the page from which the vDSO reads the time.
pub(crate) fn memory_of_the_kernel() -> HostRegion {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let line = maps.lines().find(|line| line.ends_with("[vvar]")).expect("this kernel maps a [vvar]");
    let base = usize::from_str_radix(line.split_once('-').unwrap().0, 16).unwrap();
    let base = NonNull::new(std::ptr::with_exposed_provenance_mut::<u8>(base)).unwrap();
    // SAFETY: mapped as long as the process lives, without any reference to it. It is not writable: the callers only
    // read.
    unsafe { HostRegion::from_raw(base, 4096, PageSize::SIZE_4K, Arc::new(())) }
}

/// A KVM guest without devices: one vCPU in flat 32-bit mode that writes the requested pages.
#[cfg(feature = "kvm")]
pub(crate) struct TestVm {
    vcpu: kvm_ioctls::VcpuFd,
    vm: kvm_ioctls::VmFd,
    memory: KvmMemory,
}

#[cfg(feature = "kvm")]
impl TestVm {
    const CODE_SLOT: u32 = 99;
    const CODE_AT: u64 = 0xe000_0000;
    /// For ECX pages from EBX on: writes EAX, counting up, at 0x10 of the page.
    const CODE: [u8; 16] = [
        0x89, 0x43, 0x10, //                   mov [ebx+0x10], eax
        0x40, //                               inc eax
        0x81, 0xc3, 0x00, 0x10, 0x00, 0x00, // add ebx, 0x1000
        0x49, //                               dec ecx
        0x75, 0xf3, //                         jnz -13
        0xe6, 0x10, //                         out 0x10, al
        0xf4, //                               hlt
    ];

    pub(crate) fn new() -> Self {
        Self::prepared(|_| ())
    }

    /// As [`new`](Self::new); `prepare` sees the VM before it has a vCPU.
    pub(crate) fn prepared(prepare: impl FnOnce(OwnedFd)) -> Self {
        let kvm =
            kvm_ioctls::Kvm::new().expect("/dev/kvm; run on a machine with KVM, as a user of group kvm");
        let vm = kvm.create_vm().unwrap();
        prepare(duplicate(&vm).unwrap());
        let vcpu = vm.create_vcpu(0).unwrap();
        let mut sregs = vcpu.get_sregs().unwrap();
        sregs.cr0 |= 1;
        let flat = |kind| kvm_bindings::kvm_segment {
            limit: u32::MAX,
            selector: 8,
            type_: kind,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        sregs.cs = flat(0xb);
        (sregs.ds, sregs.es, sregs.ss) = (flat(3), flat(3), flat(3));
        vcpu.set_sregs(&sregs).unwrap();
        let memory = KvmMemory::new(duplicate(&vm).unwrap());
        let mut this = Self { vcpu, vm, memory };
        let code = Mapping::anonymous(4096).unwrap();
        code.region().span(0, 4096).unwrap().copy_from(&Self::CODE);
        this.map(Self::CODE_SLOT, Self::CODE_AT, code.region(), 0, 4096);
        this
    }

    /// A duplicate of the VM's descriptor.
    pub(crate) fn fd(&self) -> OwnedFd {
        duplicate(&self.vm).unwrap()
    }

    /// A duplicate of the vCPU's descriptor.
    pub(crate) fn vcpu_fd(&self) -> OwnedFd {
        duplicate(&self.vcpu).unwrap()
    }

    /// Maps a part of `region` into the guest.
    pub(crate) fn map(&mut self, slot: u32, guest_addr: u64, region: &HostRegion, offset: u64, len: u64) {
        self.memory.add(slot, guest_addr, region, offset, len).unwrap();
    }

    /// Makes the vCPU write `pages` pages at `guest_addr`, one after the other.
    pub(crate) fn write_pages(&mut self, guest_addr: u64, pages: u64, stamp: u32) {
        self.run_pages(guest_addr, pages, stamp, &mut || panic!("the vCPU's dirty ring is full"));
    }

    /// As [`write_pages`](Self::write_pages), calling `ring_full` each time the vCPU stops because its dirty ring is
    /// full. The vCPU exits the guest every few pages, so that a KVM that emulates it also checks its ring in time.
    pub(crate) fn write_pages_with(
        &mut self,
        guest_addr: u64,
        pages: u64,
        stamp: u32,
        ring_full: &mut dyn FnMut(),
    ) {
        for first in (0..pages).step_by(32) {
            let at = guest_addr + first * 4096;
            self.run_pages(at, 32.min(pages - first), stamp.wrapping_add(first as u32), ring_full);
        }
    }

    /// Runs the vCPU until it has written its pages; stops for good if `ring_full` leaves its ring full.
    pub(crate) fn run_pages(&mut self, guest_addr: u64, pages: u64, stamp: u32, ring_full: &mut dyn FnMut()) {
        let regs = kvm_bindings::kvm_regs {
            rax: stamp.into(),
            rbx: guest_addr,
            rcx: pages,
            rip: Self::CODE_AT,
            rflags: 2,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
        loop {
            match self.vcpu.run().unwrap() {
                kvm_ioctls::VcpuExit::IoOut(0x10, _) => return,
                kvm_ioctls::VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL) => ring_full(),
                other => panic!("the test guest left by {other:?}"),
            }
        }
    }
}

/// Of ci/aarch64, which leaves out the modules that can't do without.
#[test]
fn what_this_kernel_lacks_is_said() {
    let found = [has_huge_pages(PageSize::SIZE_2M, 1), has_userfaultfd(), has_holes()];
    assert!(found.iter().all(|has| *has) || std::env::var_os("RAMWIRE_MAY_LACK").is_some());
}
