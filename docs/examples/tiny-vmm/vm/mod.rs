//! A small virtual machine on KVM, as a VMM would embed `ramwire`: several vCPUs in flat 32-bit mode, whose program
//! ([`code`]) writes pages that describe themselves at a set rate and checks each before it writes it again.
//!
//! What ramwire needs of it is in three places: [`TinyVm::memory`] are the blocks, [`TinyVm::dirty_source`] knows what the
//! vCPUs wrote, and [`GuestControl`] pauses and throttles, [`DeviceState`] saves and loads. It has no device that writes RAM; a VMM with
//! devices gives their writes as a further dirty source.

mod code;
mod kick;
mod state;
mod vcpu;
mod verify;

use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_ioctls::{Kvm, VmFd};
use ramwire::guest::{
    DeviceState, DirtyError, DirtySource, GuestControl, GuestMemory, KvmDirtyLog, KvmDirtyRing, KvmSlot,
    MappedGuest, RingSize, VcpuGate, VcpuThreads,
};
use ramwire::session::Lease;
use ramwire::sys::{KvmMemory, duplicate};
use ramwire::units::{BlockIndex, BlockOffset, GuestAddr, Percent, Rate, RestShare};
use serde::{Deserialize, Serialize};

use self::code::{Plan, all_pages, invalid};
use self::state::SavedState;
use self::vcpu::Vcpu;
pub(crate) use self::verify::Found;

/// RAM ends here at the latest: the guest's addresses have 32 bits, and a PC has its devices above.
const RAM_END: u64 = 3 << 30;
/// Blocks without an address of their own follow each other at such steps.
const BLOCK_STEP: u64 = 2 << 20;
/// Most vCPUs; bounds what a device state can make us start.
const MAX_VCPUS: u32 = 64;
/// A vCPU that is kicked leaves the guest at once, and does what its last exit asks for.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);
/// A signal that came just before KVM_RUN is lost: it is sent again after this long.
const AGAIN: Duration = Duration::from_millis(1);
/// Entries of a dirty ring: QEMU's usual choice is 4096; this one lasts longer, at 1 MiB a vCPU.
const RING: u32 = 65536;

/// How KVM tells of writes; chosen when the VM is made, since a VM with rings has no log that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Log {
    /// The dirty log, cleared and protected by the chunk where KVM can.
    Bitmap,
    /// A dirty ring for each vCPU.
    Ring,
}

/// What the guest is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Shape {
    /// Number of vCPUs, 1 to 64.
    pub vcpus: u32,
    /// Bytes that all vCPUs together keep writing.
    pub working_set: u64,
    /// Bytes a second that they write, as if each write filled its page: `None` for as fast as they can, 0 for an idle guest.
    pub rate: Option<u64>,
    /// Bytes of a page that each write changes, from 12 on.
    pub write_size: u32,
    /// Share of the pages outside the working set that are zero, in percent.
    pub zero: u32,
}

impl Shape {
    fn check(&self) -> io::Result<()> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(invalid(format!("{} vCPUs; give 1 to {MAX_VCPUS}", self.vcpus)));
        }
        Ok(())
    }
}

/// The VM. Clones are handles of the same one; the last ends it.
#[derive(Clone)]
pub(crate) struct TinyVm {
    /// Goes first: no vCPU runs any more when the memory is taken from the VM.
    machine: Arc<Mutex<Option<Machine>>>,
    board: Arc<Board>,
    vcpu_threads: VcpuThreads,
}

/// What is there before it is known how many vCPUs there are.
#[derive(Debug)]
struct Board {
    memory: Arc<MappedGuest>,
    addresses: Vec<u32>,
    slots: Vec<KvmSlot>,
    ring: Option<RingSize>,
    lease: Lease,
    vm: VmFd,
    /// Shows the memory to the guest as long as this lives.
    _shown: KvmMemory,
}

/// The vCPUs.
struct Machine {
    shape: Shape,
    plan: Plan,
    gate: Arc<VcpuGate>,
    vcpus: Vec<Arc<Vcpu>>,
    /// Of the vCPUs, in their order; empty until the guest first runs.
    threads: Arc<OnceLock<Vec<JoinHandle<()>>>>,
    kicker: Option<JoinHandle<()>>,
    source: Arc<dyn DirtySource>,
    ring: Option<Arc<KvmDirtyRing>>,
}

impl TinyVm {
    /// A VM that waits for a device state, over memory into which a migration comes. A block without a guest address gets
    /// one behind the others.
    ///
    /// # Errors
    /// No /dev/kvm that works, no dirty rings, or blocks that don't fit below 3 GiB; each says what would help.
    pub(crate) fn empty(memory: Arc<MappedGuest>, log: Log) -> io::Result<Self> {
        let open = Kvm::new().and_then(|kvm| kvm.create_vm());
        let vm = open.map_err(|error| {
            let help = "it needs KVM and a user of group kvm";
            io::Error::new(io::Error::from(error).kind(), format!("/dev/kvm: {error}; {help}"))
        })?;
        let addresses = addresses(&memory)?;
        let mut shown = KvmMemory::new(duplicate(&vm)?);
        let mut slots = Vec::new();
        for (number, (block, _, region)) in memory.regions().enumerate() {
            let (slot, guest_addr) = (number as u32, u64::from(addresses[number]));
            let len = memory.table().blocks()[number].used_length;
            shown.add(slot, guest_addr, region, 0, len)?;
            let guest_addr = GuestAddr(guest_addr);
            slots.push(KvmSlot { slot, guest_addr, block, offset: BlockOffset(0), len, flags: 0 });
        }
        let ring = match log {
            Log::Bitmap => None,
            Log::Ring => Some(RingSize::enable(duplicate(&vm)?, RING).map_err(io::Error::other)?),
        };
        kick::prepare_kicks()?;
        let board = Board { memory, addresses, slots, ring, lease: Lease::default(), vm, _shown: shown };
        Ok(Self { board: Arc::new(board), machine: Arc::default(), vcpu_threads: VcpuThreads::default() })
    }

    /// A VM over fresh zero memory, filled and standing before its first instruction.
    ///
    /// # Errors
    /// As [`empty`](Self::empty); a shape that does not fit the memory.
    pub(crate) fn filled(memory: Arc<MappedGuest>, log: Log, shape: Shape) -> io::Result<Self> {
        let this = Self::empty(memory, log)?;
        let machine = this.board.machine(shape)?;
        for run in all_pages(&this.board.memory) {
            let table = this.board.memory.table();
            let landing = table.admit_run(run).map_err(io::Error::other)?;
            let span = this.board.memory.span(landing).map_err(io::Error::other)?;
            let bytes = verify::to_bytes(&machine.plan.fill(run));
            if bytes != [0; 4096] {
                span.copy_from(&bytes);
            }
        }
        let code_at = this.board.addresses[BlockIndex(0).as_usize()];
        for (vcpu, lane) in machine.vcpus.iter().zip(&machine.plan.lanes) {
            vcpu.begin(code_at.into(), lane, machine.plan.check_words())?;
        }
        *this.machine() = Some(machine);
        Ok(this)
    }

    /// The RAM blocks.
    pub(crate) fn memory(&self) -> &Arc<MappedGuest> {
        &self.board.memory
    }

    /// Which thread runs which vCPU.
    pub(crate) fn vcpu_threads(&self) -> VcpuThreads {
        self.vcpu_threads.clone()
    }

    /// What the vCPUs look at before they enter the guest.
    pub(crate) fn lease(&self) -> Lease {
        self.board.lease.clone()
    }

    /// Pages that the vCPUs have written in a run that ended when the lease had run out.
    pub(crate) fn pages_written_late(&self) -> u64 {
        self.with(|machine| Ok(machine.vcpus.iter().map(|vcpu| vcpu.wrote_late()).sum())).unwrap_or(0)
    }

    /// Knows what the vCPUs write.
    ///
    /// # Errors
    /// `InvalidInput` if the VM has no state yet.
    pub(crate) fn dirty_source(&self) -> io::Result<Arc<dyn DirtySource>> {
        self.with(|machine| Ok(machine.source.clone()))
    }

    /// Pages the vCPUs have written since they came here.
    pub(crate) fn pages_written(&self) -> u64 {
        self.with(|machine| Ok(machine.vcpus.iter().map(|vcpu| vcpu.wrote()).sum())).unwrap_or(0)
    }

    /// Looks at every page from outside; the VM must stand still.
    ///
    /// # Errors
    /// `InvalidInput` if it runs or has no state yet; what KVM says.
    pub(crate) fn verify(&self) -> io::Result<Found> {
        self.with(|machine| {
            machine.must_stand_still()?;
            let mut found = Found::default();
            let mut sequences = Vec::new();
            for (number, vcpu) in machine.vcpus.iter().enumerate() {
                sequences.push(vcpu.save()?.sequence());
                if let Some(why) = vcpu.trouble() {
                    found.add(format!("vCPU {number} had to stop: {why}"));
                }
            }
            verify::check_pages(&self.board.memory, &machine.plan, &sequences, &mut found);
            Ok(found)
        })
    }

    fn machine(&self) -> MutexGuard<'_, Option<Machine>> {
        self.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, work: impl FnOnce(&mut Machine) -> io::Result<T>) -> io::Result<T> {
        let none = "the VM has no state: fill it or load its devices first";
        work(self.machine().as_mut().ok_or_else(|| invalid(none.into()))?)
    }
}

impl Board {
    fn machine(&self, shape: Shape) -> io::Result<Machine> {
        shape.check()?;
        let plan = Plan::new(&self.memory, &self.addresses, &shape)?;
        let made = (0..u64::from(shape.vcpus)).map(|number| self.vm.create_vcpu(number));
        let fds = made.collect::<Result<Vec<_>, _>>()?;
        let ring = self.ring.map(|size| {
            let vcpus = fds.iter().map(duplicate).collect::<io::Result<Vec<_>>>()?;
            let ring = KvmDirtyRing::new(&*self.memory, duplicate(&self.vm)?, &self.slots, vcpus, size);
            ring.map(Arc::new).map_err(io::Error::other)
        });
        let ring = ring.transpose()?;
        let source: Arc<dyn DirtySource> = match &ring {
            Some(ring) => ring.clone(),
            None => {
                let log: Result<_, DirtyError> =
                    KvmDirtyLog::new(&*self.memory, duplicate(&self.vm)?, &self.slots);
                Arc::new(log.map_err(io::Error::other)?)
            }
        };
        let gate = Arc::new(VcpuGate::new(shape.vcpus));
        let rate = shape.rate.map(|rate| Rate(rate.div_ceil(shape.vcpus.into())));
        let lease = &self.lease;
        let vcpu =
            |(number, fd)| Arc::new(Vcpu::new(fd, number, (gate.clone(), lease.clone()), ring.clone(), rate));
        let vcpus = fds.into_iter().enumerate().map(vcpu).collect();
        Ok(Machine { shape, plan, gate, vcpus, threads: Arc::default(), kicker: None, source, ring })
    }
}

impl Machine {
    fn threads(&self) -> &[JoinHandle<()>] {
        self.threads.get().map_or(&[], Vec::as_slice)
    }

    fn must_stand_still(&self) -> io::Result<()> {
        if self.gate.is_closed() { Ok(()) } else { Err(invalid("the VM runs; pause it first".into())) }
    }

    fn start_threads(&mut self, known: &VcpuThreads) -> io::Result<()> {
        let start = |(number, vcpu): (usize, &Arc<Vcpu>)| {
            let (vcpu, known) = (vcpu.clone(), known.clone());
            std::thread::Builder::new().name(format!("vcpu-{number}")).spawn(move || vcpu.run(&known))
        };
        let threads = self.vcpus.iter().enumerate().map(start).collect::<io::Result<_>>()?;
        let threads = self.threads.get_or_init(|| threads);
        debug_assert_eq!(threads.len(), self.vcpus.len());
        let (gate, threads) = (self.gate.clone(), self.threads.clone());
        let kick = move || kick::kick_throttled(&gate, threads.get().map_or(&[], Vec::as_slice));
        self.kicker = Some(std::thread::Builder::new().name("vcpu-kicker".into()).spawn(kick)?);
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.gate.end();
        while !self.threads().iter().all(JoinHandle::is_finished) {
            kick::kick(self.threads());
            std::thread::sleep(AGAIN);
        }
        if let Some(kicker) = self.kicker.take() {
            // It has nothing to tell.
            drop(kicker.join());
        }
    }
}

impl GuestControl for TinyVm {
    fn pause(&mut self) -> io::Result<()> {
        self.with(|machine| machine.gate.close(PAUSE_TIMEOUT, || kick::kick(machine.threads())))
    }

    fn resume(&mut self) -> io::Result<()> {
        self.with(|machine| {
            if machine.threads().is_empty() {
                machine.start_threads(&self.vcpu_threads)?;
            }
            machine.gate.open();
            Ok(())
        })
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    fn throttle(&mut self, share: Percent) {
        // A VM without a state has nothing to throttle.
        let _ = self.with(|machine| {
            machine.gate.set_throttle(share);
            Ok(())
        });
    }

    /// By the rings, which tell whose writes they are. The log doesn't: then by the guest itself, which leaves KVM_RUN after
    /// each page.
    fn vcpu_dirty_pages(&mut self) -> Vec<u64> {
        let count = |machine: &mut Machine| {
            let told = || machine.vcpus.iter().map(|vcpu| vcpu.wrote()).collect();
            Ok(machine.ring.as_ref().map_or_else(told, |ring| ring.pages_written()))
        };
        self.with(count).unwrap_or_default()
    }

    fn throttle_vcpu(&mut self, vcpu: usize, rest: RestShare) {
        let _ = self.with(|machine| {
            machine.gate.set_rest(vcpu, rest);
            Ok(())
        });
    }

    /// The VM gives no page back.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for TinyVm {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.with(|machine| {
            machine.must_stand_still()?;
            let vcpus = machine.vcpus.iter().map(|vcpu| vcpu.save()).collect::<io::Result<_>>()?;
            let state = SavedState::new(machine.shape, &self.board.memory, &self.board.addresses, vcpus);
            out.write_all(&state.encode()?)
        })
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let state = SavedState::decode(from, &self.board.memory, &self.board.addresses)?;
        let machine = self.board.machine(state.shape)?;
        for (vcpu, registers) in machine.vcpus.iter().zip(&state.vcpus) {
            vcpu.load(registers)?;
        }
        *self.machine() = Some(machine);
        Ok(())
    }
}

/// Where the guest sees each block.
fn addresses(memory: &MappedGuest) -> io::Result<Vec<u32>> {
    let mut next = 0;
    let address = |block: &ramwire::ram::RamBlock| {
        let at = block.guest_addr.map_or(next, |at| at.0);
        let end = at.checked_add(block.used_length).filter(|end| *end <= RAM_END);
        let end = end.ok_or_else(|| {
            let (name, max) = (&block.name, RAM_END >> 20);
            invalid(format!("RAM block {name} does not end below {max} MiB, as this VM's 32-bit guest needs"))
        })?;
        next = next.max(end.next_multiple_of(BLOCK_STEP));
        u32::try_from(at).map_err(|_| invalid(format!("RAM block {} starts above 4 GiB", block.name)))
    };
    memory.table().blocks().iter().map(address).collect()
}
