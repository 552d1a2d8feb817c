//! A guest without a VM: threads that keep writing self-describing pages.
//!
//! Each writer owns a part of the working set. It writes its pages one after the other, in a fixed order and
//! repeatedly, and counts the writes. The expected content of every page follows from the configuration and one number
//! for each writer: how many writes it has done. That number is sent in the device state, not in RAM. So a page that
//! missed the last round is found, although it is a complete, valid page: it holds an older write.
//!
//! A writer finishes its page and marks it in the guest's [`SoftwareBitmap`] before it pauses.

mod pace;
mod page;
mod plan;
mod reader;
mod state;
mod verify;

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

pub use page::{Content, Stamp};
pub use plan::SyntheticConfig;
#[cfg(test)]
pub(in crate::guest) use plan::stride;
pub use verify::{PageFault, VerifyReport};

use self::pace::Pace;
use self::plan::Plan;
use self::reader::Readers;
use self::verify::Faults;
use super::{DeviceState, GuestControl, GuestMemory, MappedGuest, SoftwareBitmap, VcpuGate, VcpuThreads};
use crate::ram::PageRun;
use crate::sys::{HostSpan, Lock as _};
use crate::units::{BlockIndex, PageIndex, Percent, Rate, RestShare};

/// A writer finishes its current page before it pauses: this takes microseconds, unless the machine is stuck.
const PAUSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A guest whose threads write self-describing pages. Clones are handles of the same guest; the last one
/// ends the writers.
#[derive(Clone, Debug)]
pub struct SyntheticGuest {
    memory: Arc<MappedGuest>,
    software: Arc<SoftwareBitmap>,
    machine: Arc<Mutex<Option<Machine>>>,
    /// Its threads read all memory on arrival.
    reads: bool,
    vcpus: VcpuThreads,
}

/// The writers and readers, and what they share.
#[derive(Debug)]
struct Machine {
    shared: Arc<Shared>,
    /// Empty until the guest first runs.
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    memory: Arc<MappedGuest>,
    software: Arc<SoftwareBitmap>,
    plan: Plan,
    gate: VcpuGate,
    /// Writes done, one a writer.
    done: Vec<AtomicU64>,
    /// The value of `done` when the device state was loaded; `None` on the host where the guest was created.
    loaded: Option<Vec<u64>>,
    readers: Readers,
    faults: Mutex<Faults>,
}

impl SyntheticGuest {
    /// A guest that waits for a device state, over memory that a migration fills.
    pub fn empty(memory: Arc<MappedGuest>) -> Self {
        let software = Arc::new(SoftwareBitmap::new(memory.table()));
        Self { memory, software, machine: Arc::default(), reads: false, vcpus: VcpuThreads::default() }
    }

    /// From its arrival on as many threads as it has writers read each page once, in a scattered order, and compare
    /// those that no writer writes. After a switch to postcopy they fault on missing pages.
    #[must_use]
    pub fn reading(self) -> Self {
        Self { reads: true, ..self }
    }

    /// A paused guest over fresh zero memory, filled as `config` describes.
    ///
    /// # Errors
    /// A configuration that [`load`](DeviceState::load) would refuse too.
    pub fn filled(memory: Arc<MappedGuest>, config: SyntheticConfig) -> io::Result<Self> {
        let guest = Self::empty(memory);
        let plan = Plan::new(guest.memory.table(), config);
        let writers = plan.config.writers as usize;
        let shared = guest.install(plan, vec![0; writers], false);
        verify::fill(&shared)?;
        Ok(guest)
    }

    /// Its threads, each as a vCPU: the writers, then the readers.
    pub fn vcpu_threads(&self) -> VcpuThreads {
        self.vcpus.clone()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<MappedGuest> {
        &self.memory
    }

    /// A dirty source that the writers mark, for kernels that can't track their writes.
    pub fn software(&self) -> Arc<SoftwareBitmap> {
        self.software.clone()
    }

    /// Number of pages written so far by all writers, including those on the source host.
    pub fn pages_written(&self) -> u64 {
        let sum = |machine: &mut Machine| machine.shared.done.iter().map(|n| n.load(Ordering::Relaxed)).sum();
        self.with(|machine| machine.map_or(0, sum))
    }

    /// Number of pages that threads have read since its arrival, for [`reading`](Self::reading).
    pub fn pages_read(&self) -> u64 {
        self.with(|machine| machine.map_or(0, |machine| machine.shared.readers.read()))
    }

    /// True if threads have no page left to read.
    pub fn is_read(&self) -> bool {
        self.with(|machine| machine.is_none_or(|machine| machine.shared.readers.are_through()))
    }

    /// Checks every page of every migrated block against its last write; the guest must be paused. The writers have
    /// already checked the pages that they overwrote since the device state was loaded.
    ///
    /// # Errors
    /// `InvalidInput` if the guest runs or has no state yet.
    pub fn verify(&self) -> io::Result<VerifyReport> {
        let shared = self.still()?;
        verify::verify(&shared)
    }

    fn with<T>(&self, work: impl FnOnce(Option<&mut Machine>) -> T) -> T {
        work(self.machine.locked().as_mut())
    }

    fn install(&self, plan: Plan, done: Vec<u64>, arrived: bool) -> Arc<Shared> {
        let table = self.memory.table();
        let readers = Readers::new(table, if self.reads && arrived { plan.config.writers } else { 0 });
        let shared = Arc::new(Shared {
            memory: self.memory.clone(),
            software: self.software.clone(),
            gate: VcpuGate::new(plan.config.writers + readers.threads),
            done: done.iter().map(|done| AtomicU64::new(*done)).collect(),
            loaded: arrived.then_some(done),
            readers,
            plan,
            faults: Mutex::default(),
        });
        let machine = Machine { shared: shared.clone(), threads: Vec::new() };
        *self.machine.locked() = Some(machine);
        shared
    }

    /// The machine if it is paused.
    fn still(&self) -> io::Result<Arc<Shared>> {
        let shared =
            self.with(|machine| machine.map(|machine| machine.shared.clone())).ok_or_else(no_state)?;
        if !shared.gate.is_closed() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the guest runs; pause it first"));
        }
        Ok(shared)
    }
}

impl GuestControl for SyntheticGuest {
    fn pause(&mut self) -> io::Result<()> {
        self.with(|machine| machine.ok_or_else(no_state)?.shared.gate.close(PAUSE_TIMEOUT, || {}))
    }

    fn resume(&mut self) -> io::Result<()> {
        self.with(|machine| {
            let machine = machine.ok_or_else(no_state)?;
            if machine.threads.is_empty() {
                let writers = machine.shared.plan.config.writers;
                for writer in 0..writers {
                    let (shared, vcpus) = (machine.shared.clone(), self.vcpus.clone());
                    let thread = std::thread::Builder::new().name(format!("guest-writer-{writer}"));
                    machine.threads.push(thread.spawn(move || {
                        vcpus.enter(writer);
                        shared.run_writer(writer);
                    })?);
                }
                for reader in 0..machine.shared.readers.threads {
                    let (shared, vcpus) = (machine.shared.clone(), self.vcpus.clone());
                    let thread = std::thread::Builder::new().name(format!("guest-reader-{reader}"));
                    machine.threads.push(thread.spawn(move || {
                        vcpus.enter(writers + reader);
                        shared.run_reader(reader);
                    })?);
                }
            }
            machine.shared.gate.open();
            Ok(())
        })
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }

    fn throttle(&mut self, share: Percent) {
        self.with(|machine| machine.iter().for_each(|machine| machine.shared.gate.set_throttle(share)));
    }

    /// Its writers are its vCPUs.
    fn vcpu_dirty_pages(&mut self) -> Vec<u64> {
        let count = |machine: &mut Machine| {
            let counted = machine.shared.done.iter().map(|done| done.load(Ordering::Relaxed));
            counted.collect()
        };
        self.with(|machine| machine.map_or_else(Vec::new, count))
    }

    fn throttle_vcpu(&mut self, vcpu: usize, rest: RestShare) {
        self.with(|machine| machine.iter().for_each(|machine| machine.shared.gate.set_rest(vcpu, rest)));
    }

    /// The synthetic guest frees no pages.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for SyntheticGuest {
    /// The counts change, the length does not.
    fn size(&mut self) -> u64 {
        let length = |machine: &mut Machine| {
            let done = vec![0; machine.shared.done.len()];
            state::encode(self.memory.table(), &machine.shared.plan.config, &done).len() as u64
        };
        self.with(|machine| machine.map_or(0, length))
    }

    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let shared = self.still()?;
        let done: Vec<u64> = shared.done.iter().map(|done| done.load(Ordering::Acquire)).collect();
        out.write_all(&state::encode(self.memory.table(), &shared.plan.config, &done))
    }

    /// Replaces the guest's state; its memory is the received memory.
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let (config, done) = state::decode(self.memory.table(), from)?;
        self.install(Plan::new(self.memory.table(), config), done, true);
        Ok(())
    }

    /// A later state takes the place of this one.
    fn loads_again(&self) -> bool {
        true
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.shared.gate.end();
        for thread in self.threads.drain(..) {
            // A panic of a writer was already reported; there is nothing to end.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn run_writer(&self, writer: u32) {
        let writers = u64::from(self.plan.config.writers);
        let mut pace = Pace::new(writer, self.plan.config.rate.map(|rate| Rate(rate.0.div_ceil(writers))));
        let page_bytes = self.memory.table().page().bytes();
        let mut buffer = vec![0; page_bytes as usize];
        let mut ran = self.gate.arrive().then_some(true);
        while let Some(stood_still) = ran {
            if stood_still {
                pace.restart();
            }
            if pace.is_idle() || !self.write_next(writer, &mut buffer) {
                pace.rest(&self.gate);
            } else {
                pace.wrote(page_bytes, &self.gate);
            }
            ran =
                if self.gate.is_open() { Some(false) } else { self.gate.wait_while_closed().then_some(true) };
        }
    }

    /// The writer's next complete write: bytes, mark, count. `false` if it has no page to write.
    fn write_next(&self, writer: u32, buffer: &mut [u8]) -> bool {
        let Some(done) = self.done.get(writer as usize) else { return false };
        let sequence = done.load(Ordering::Relaxed) + 1;
        let Some((block, page)) = self.plan.place(writer, sequence) else { return false };
        let run = PageRun { block: BlockIndex(block), first: PageIndex(page), pages: 1 };
        let Some(span) = self.span(run) else { return false };
        // The first pass after an arrival overwrites the received pages: this is the last chance to check them.
        let loaded = self.loaded.as_ref().and_then(|loaded| loaded.get(writer as usize));
        if loaded.is_some_and(|loaded| sequence <= loaded + self.plan.pages_of(writer)) {
            // May wait for a missing page, so no lock is held.
            span.copy_to(buffer);
            let expected = self.plan.before(writer, sequence, block, page);
            self.faults().check(&self.memory, run, expected, page::read(buffer, self.plan.config.seed));
        }
        let config = &self.plan.config;
        page::write(buffer, config.seed, Stamp { block, writer, page, sequence }, config.changes);
        span.copy_from(buffer);
        self.software.mark_run(run);
        done.store(sequence, Ordering::Release);
        true
    }

    fn span(&self, run: PageRun) -> Option<HostSpan<'_>> {
        self.memory.span(self.memory.table().admit_run(run).ok()?).ok()
    }

    fn faults(&self) -> std::sync::MutexGuard<'_, Faults> {
        self.faults.locked()
    }
}

fn no_state() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the guest has no state: fill it or load its devices first")
}

#[cfg(test)]
mod tests;
