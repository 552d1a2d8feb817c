//! A vCPU: its registers, and the thread that runs it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events};
use kvm_ioctls::{VcpuExit, VcpuFd};
use ramwire::guest::{KvmDirtyRing, VcpuGate, VcpuThreads};
use ramwire::session::Lease;
use ramwire::units::Rate;
use serde::{Deserialize, Serialize};

use super::code::{Lane, PAGE, USED_UP, WRONG, WROTE};
use super::kick::SLICE;

/// What a vCPU that fell behind its rate makes up for.
const BURST: Duration = Duration::from_millis(20);
/// Shorter sleeps cost more than they save.
const NAP: Duration = Duration::from_millis(1);

/// All that this guest's code needs of a vCPU. A guest with an operating system has more: FPU and XSAVE, MSRs, the local
/// APIC, the clock.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) general: kvm_regs,
    pub(super) special: kvm_sregs,
    pub(super) events: kvm_vcpu_events,
}

impl Registers {
    /// Those with which a vCPU begins to write its lane: flat 32-bit segments, no paging.
    fn at_start(special: kvm_sregs, code_at: u64, lane: &Lane, check_words: u32) -> Self {
        let flat = |selector, type_| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let (code, data) = (flat(0x8, 0xb), flat(0x10, 0x3));
        let segments = kvm_sregs { cs: code, ds: data, es: data, fs: data, gs: data, ss: data, ..special };
        let general = kvm_regs {
            rip: code_at,
            rflags: 2,
            rbx: lane.address.into(),
            rbp: lane.pages.into(),
            rsi: lane.pages.into(),
            rsp: check_words.into(),
            ..Default::default()
        };
        let events = kvm_vcpu_events::default();
        Self { general, special: kvm_sregs { cr0: special.cr0 | 1, ..segments }, events }
    }

    /// Writes the guest has finished; ESI is the one it is at.
    pub(super) fn sequence(&self) -> u32 {
        self.general.rsi as u32
    }
}

#[derive(Debug)]
pub(super) struct Vcpu {
    /// Held by the thread while it may run, free while it stands still.
    fd: Mutex<VcpuFd>,
    number: usize,
    gate: Arc<VcpuGate>,
    lease: Lease,
    ring: Option<Arc<KvmDirtyRing>>,
    /// This vCPU's own.
    rate: Option<Rate>,
    wrote: AtomicU64,
    wrote_late: AtomicU64,
    /// Why it can't run any more.
    trouble: Mutex<Option<String>>,
}

impl Vcpu {
    pub(super) fn new(
        fd: VcpuFd,
        number: usize,
        (gate, lease): (Arc<VcpuGate>, Lease),
        ring: Option<Arc<KvmDirtyRing>>,
        rate: Option<Rate>,
    ) -> Self {
        let (fd, trouble) = (Mutex::new(fd), Mutex::default());
        let [wrote, wrote_late] = [0; 2].map(AtomicU64::new);
        Self { fd, number, gate, lease, ring, rate, wrote, wrote_late, trouble }
    }

    fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, code_at: u64, lane: &Lane, check_words: u32) -> io::Result<()> {
        let special = self.fd().get_sregs()?;
        self.load(&Registers::at_start(special, code_at, lane, check_words))
    }

    /// The registers; the vCPU stands still.
    pub(super) fn save(&self) -> io::Result<Registers> {
        let fd = self.fd();
        Ok(Registers { general: fd.get_regs()?, special: fd.get_sregs()?, events: fd.get_vcpu_events()? })
    }

    pub(super) fn load(&self, registers: &Registers) -> io::Result<()> {
        let fd = self.fd();
        fd.set_sregs(&registers.special)?;
        fd.set_regs(&registers.general)?;
        fd.set_vcpu_events(&registers.events)?;
        Ok(())
    }

    /// Pages written since it came here.
    pub(super) fn wrote(&self) -> u64 {
        self.wrote.load(Ordering::Relaxed)
    }

    /// Of those, the ones that were finished after the lease had run out: in a run that was entered before.
    pub(super) fn wrote_late(&self) -> u64 {
        self.wrote_late.load(Ordering::Relaxed)
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the thread does.
    pub(super) fn run(&self, threads: &VcpuThreads) {
        threads.enter(self.number as u32);
        let mut runs = self.gate.arrive();
        while runs {
            let mut fd = self.fd();
            let ran = self.run_until_closed(&mut fd).and_then(|()| finish_exit(&mut fd));
            drop(fd);
            if let Err(why) = ran {
                *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(why);
                return self.gate.wait_for_end();
            }
            runs = self.gate.wait_while_closed();
        }
    }

    fn run_until_closed(&self, fd: &mut VcpuFd) -> Result<(), String> {
        let mut due = Instant::now();
        let mut slice = Instant::now();
        while self.gate.is_open() {
            if self.rate == Some(Rate(0)) {
                self.gate.nap(Duration::from_secs(3600));
                continue;
            }
            // A process that was stopped may continue here when a standby runs this guest.
            if !self.lease.holds() {
                self.gate.nap(NAP);
                continue;
            }
            match fd.run() {
                Ok(VcpuExit::IoOut(WROTE, _)) => {
                    self.wrote.fetch_add(1, Ordering::Relaxed);
                    self.wrote_late.fetch_add(u64::from(!self.lease.holds()), Ordering::Relaxed);
                    due = self.pace(due);
                }
                Ok(VcpuExit::IoOut(WRONG, _)) => return Err(wrong_page(fd)),
                Ok(VcpuExit::IoOut(USED_UP, _)) => return Err("it wrote 2^32 pages and is done".into()),
                // Somebody wants the vCPU to check the gate or its throttle, or the ring is to be emptied below.
                Ok(VcpuExit::Intr | VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => {}
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {}
                Ok(other) => return Err(format!("it left the guest by {other:?}")),
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
            if let Some(ring) = &self.ring {
                // A full ring is more than half full.
                ring.collect_if_half_full().map_err(|error| error.to_string())?;
            }
            let ran = slice.elapsed();
            if ran >= SLICE {
                if self.gate.rest(self.number, ran) {
                    // What throttling took is not made up for.
                    due = Instant::now();
                }
                slice = Instant::now();
            }
        }
        Ok(())
    }

    /// Sleeps as the rate demands after a page; the guest is idle meanwhile, as in a HLT.
    fn pace(&self, due: Instant) -> Instant {
        let Some(cost) = self.rate.and_then(|rate| rate.time_for(PAGE)) else { return due };
        let now = Instant::now();
        let next = due.max(now.checked_sub(BURST).unwrap_or(now)) + cost;
        if let Some(early) = next.checked_duration_since(now).filter(|early| *early >= NAP) {
            self.gate.nap(early);
        }
        next
    }
}

/// Lets KVM complete the instruction by which the vCPU left: before, its registers are not those behind it.
fn finish_exit(fd: &mut VcpuFd) -> Result<(), String> {
    fd.set_kvm_immediate_exit(1);
    let left = fd.run().map(|exit| format!("{exit:?}"));
    fd.set_kvm_immediate_exit(0);
    match left {
        Err(error) if error.errno() == libc::EINTR => Ok(()),
        other => Err(format!("KVM_RUN to complete an exit: {other:?}")),
    }
}

fn wrong_page(fd: &VcpuFd) -> String {
    match fd.get_regs() {
        Ok(regs) => {
            let (n, pages) = (regs.rsi as u32, regs.rbp as u32);
            let index = n.checked_rem(pages).unwrap_or(0);
            let before = n.wrapping_sub(pages);
            let at = (regs.rbx as u32).wrapping_add(index << 12);
            format!("the guest found its page at {at:#x} not as its write {before:#x} left it")
        }
        Err(error) => format!("the guest found a wrong page; KVM_GET_REGS: {error}"),
    }
}
