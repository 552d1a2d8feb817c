//! Faults at the destination, at an exact number of pages: the thread that is about to place the next one makes them.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ramwire::guest::{GuestError, GuestMemory, MappedGuest};
use ramwire::observe::SharedStatistics;
use ramwire::ram::{Landing, RamBlockTable};
use ramwire::sys::{HostRegion, HostSpan};
use ramwire::transport::StreamBreaker;
use ramwire::units::BlockIndex;
use rustix::process::{Pid, Signal, getpid, kill_process};

use crate::log::Log;
use crate::plan::{Fault, Plan};

/// The faults that are still to come; clones are the same.
#[derive(Clone)]
pub(crate) struct Faults(Arc<Mutex<State>>);

struct State {
    /// The next one last.
    due: Vec<(u64, Fault)>,
    at_accept: Vec<(u32, Fault)>,
    /// Connections after the first that were accepted.
    accepted: u32,
    breakers: Vec<StreamBreaker>,
    figures: Option<SharedStatistics>,
    dir: PathBuf,
    log: Log,
}

impl Faults {
    pub(crate) fn new(plan: &Plan, dir: &Path) -> Self {
        let mut due = plan.faults.clone();
        due.reverse();
        let (at_accept, dir, log) = (plan.at_accept.clone(), dir.to_owned(), Log::of(dir));
        let state = State { due, at_accept, accepted: 0, breakers: Vec::new(), figures: None, dir, log };
        Self(Arc::new(Mutex::new(state)))
    }

    pub(crate) fn follow(&self, figures: SharedStatistics) {
        self.0.lock().unwrap().figures = Some(figures);
    }

    /// A connection was accepted.
    pub(crate) fn accepted(&self, breaker: StreamBreaker, first: bool) {
        let mut state = self.0.lock().unwrap();
        state.breakers.push(breaker);
        if !first {
            let number = state.accepted;
            state.accepted += 1;
            let faults: Vec<_> =
                state.at_accept.iter().filter(|(at, _)| *at == number).map(|(_, fault)| *fault).collect();
            faults.into_iter().for_each(|fault| state.make(fault));
        }
    }

    /// A page is about to be placed.
    fn placing(&self) {
        let mut state = self.0.lock().unwrap();
        let Some((pages, fault)) = state.due.last().copied() else { return };
        let Some(figures) = &state.figures else { return };
        let came = figures.snapshot().pages;
        if came.normal + came.zero >= pages {
            state.due.pop();
            state.make(fault);
        }
    }
}

impl State {
    fn make(&mut self, fault: Fault) {
        let status = self.figures.as_ref().map(|figures| figures.snapshot().status).unwrap_or_default();
        self.log.line(&format!("{fault:?} at {status:?}"));
        match fault {
            Fault::Cut => self.breakers.drain(..).for_each(|breaker| breaker.reset()),
            Fault::KillDestination => kill(getpid()),
            Fault::KillSource => {
                let pid = fs::read_to_string(self.dir.join("source.pid")).unwrap();
                kill(Pid::from_raw(pid.parse().unwrap()).unwrap());
            }
        }
    }
}

fn kill(pid: Pid) {
    let killed = kill_process(pid, Signal::KILL);
    assert!(killed.is_ok() || pid != getpid(), "{killed:?}");
    while pid == getpid() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Guest memory that reports each page that is placed.
pub(crate) struct Watched {
    pub(crate) memory: Arc<MappedGuest>,
    pub(crate) faults: Faults,
}

impl GuestMemory for Watched {
    fn table(&self) -> &RamBlockTable {
        self.memory.table()
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        self.faults.placing();
        self.memory.span(landing)
    }

    fn region(&self, block: BlockIndex) -> Option<HostRegion> {
        GuestMemory::region(&*self.memory, block)
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.memory.discard(landing)
    }
}
