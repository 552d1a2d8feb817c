//! A guest whose writer runs without a filter, and a spawner that puts threads under their filters.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use ramwire::guest::{
    DeviceState, DirtyError, DirtySource, GuestControl, GuestMemory, MappedGuest, SoftwareBitmap,
};
use ramwire::ram::{BlockName, PageBitmap, PageRun, RamBlock};
use ramwire::session::{Job, Spawner};
use ramwire::sys::Mapping;
use ramwire::units::{BlockIndex, BlockOffset, PageSize};
use seccompiler::{BpfProgram, apply_filter};

use super::{PAGES, SLOW};

/// Starts threads from a thread of its own, which has no filter, and puts each under its filter.
pub(crate) fn spawner(filters: Option<HashMap<String, BpfProgram>>) -> Spawner {
    type Request = (&'static str, Job, mpsc::Sender<io::Result<JoinHandle<()>>>);
    let (ask, asked) = mpsc::channel::<Request>();
    let filters = Arc::new(filters);
    std::thread::spawn(move || {
        for (name, job, answer) in asked {
            let filters = Arc::clone(&filters);
            let filtered = move || {
                if let Some(filters) = &*filters {
                    let filter = filters.get(name);
                    apply_filter(filter.unwrap_or_else(|| panic!("no calls are listed for {name}"))).unwrap();
                }
                job();
            };
            let started = std::thread::Builder::new().name(name.to_owned()).spawn(filtered);
            answer.send(started).unwrap();
        }
    });
    Spawner::new(move |name, job| {
        let (answer, started) = mpsc::channel();
        ask.send((name, job, answer)).map_err(|_| io::Error::other("nobody starts threads"))?;
        started.recv().map_err(io::Error::other)?
    })
}

/// A guest whose writer is a thread without a filter.
#[derive(Clone)]
pub(crate) struct Machine {
    pub(crate) memory: Arc<MappedGuest>,
    pub(crate) written: Arc<SoftwareBitmap>,
    runs: Arc<Mutex<bool>>,
    pub(crate) ended: Arc<AtomicBool>,
    /// Pages that the writer may have written so far.
    allowed: Arc<AtomicU64>,
}

impl Machine {
    pub(crate) fn new() -> Self {
        let ram = Mapping::memfd("ram", PAGES * 4096).unwrap();
        let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
        let memory = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap();
        let written = Arc::new(SoftwareBitmap::new(memory.table()));
        let allowed = Arc::default();
        Self { memory: Arc::new(memory), written, runs: Arc::default(), ended: Arc::default(), allowed }
    }

    pub(crate) fn write(&self, page: u64, value: u64) {
        let landing = self.memory.table().admit(BlockIndex(0), BlockOffset(page * 4096), 8).unwrap();
        self.memory.span(landing).unwrap().copy_from(&value.to_le_bytes());
        self.written.mark(landing);
    }

    /// Fills most pages, then writes one after the other while it runs, as far as [`Paced`] allows.
    pub(crate) fn start(&self) -> JoinHandle<()> {
        (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| self.write(page, page));
        *self.runs.lock().unwrap() = true;
        let machine = self.clone();
        std::thread::spawn(move || {
            let mut step = 0_u64;
            while !machine.ended.load(Ordering::Relaxed) {
                let runs = machine.runs.lock().unwrap();
                if *runs && step < machine.allowed.load(Ordering::Relaxed) {
                    step += 1;
                    machine.write(step * 7 % PAGES, step);
                    continue;
                }
                drop(runs);
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    }

    /// It may write so many pages more.
    pub(crate) fn allow(&self, pages: u64) {
        self.allowed.fetch_add(pages, Ordering::Relaxed);
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let region = self.memory.region(BlockIndex(0)).unwrap();
        let mut out = vec![0; region.len() as usize];
        region.span(0, region.len()).unwrap().copy_to(&mut out);
        out
    }
}

impl GuestControl for Machine {
    fn pause(&mut self) -> io::Result<()> {
        *self.runs.lock().unwrap() = false;
        Ok(())
    }
    fn resume(&mut self) -> io::Result<()> {
        *self.runs.lock().unwrap() = true;
        Ok(())
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }
}

impl DeviceState for Machine {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        rest(SLOW);
        out.write_all(&[7; 1000])
    }
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.ended.store(true, Ordering::Relaxed);
        // Devices touch memory: in postcopy a missing page.
        let page = self.memory.table().admit(BlockIndex(0), BlockOffset((PAGES - 2) * 4096), 8).unwrap();
        self.memory.span(page).unwrap().copy_to(&mut [0; 8]);
        rest(SLOW);
        from.read_to_end(&mut Vec::new()).map(drop)
    }
}

/// After each sync, allows the guest a quarter as many writes as after the previous one, and none in the end: even on a
/// slow machine, the rest fits the downtime after at most eight rounds.
pub(crate) struct Paced {
    source: Arc<dyn DirtySource>,
    machine: Machine,
    next: AtomicU64,
}

impl Paced {
    pub(crate) fn new(source: Arc<dyn DirtySource>, machine: &Machine) -> Self {
        Self { source, machine: machine.clone(), next: AtomicU64::new(PAGES / 4) }
    }
}

impl DirtySource for Paced {
    fn name(&self) -> &'static str {
        self.source.name()
    }
    fn probe(&self) -> Result<(), DirtyError> {
        self.source.probe()
    }
    fn start(&self) -> Result<(), DirtyError> {
        self.source.start()
    }
    fn begin_sync(&self) -> Result<(), DirtyError> {
        let next = self.next.load(Ordering::Relaxed);
        self.next.store(next / 4, Ordering::Relaxed);
        self.machine.allowed.fetch_add(next, Ordering::Relaxed);
        self.source.begin_sync()
    }
    fn sync_into(&self, block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        self.source.sync_into(block, into)
    }
    fn reprotect(&self, run: PageRun) -> Result<(), DirtyError> {
        self.source.reprotect(run)
    }
    fn stop(&self) -> Result<(), DirtyError> {
        self.source.stop()
    }
}

/// Makes the peer wait, so that it checks its connection. It waits for a lock, so that it makes no system call of its
/// own.
pub(crate) fn rest(time: Duration) {
    let (_give, take) = mpsc::channel::<()>();
    assert_eq!(take.recv_timeout(time), Err(mpsc::RecvTimeoutError::Timeout));
}
