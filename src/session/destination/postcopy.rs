//! The guest runs here while pages are missing.
//!
//! Three threads work side by side from the package on: the session's own reads the main connection and places pages;
//! `ramwire-load` loads the device state and starts the guest; `ramwire-faults` waits for faults and sends requests. A
//! request needs nothing but the return path: it waits for no batch and for no page that is being placed.

mod loading;
mod shared;

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use std::os::fd::AsFd;

use crate::engine::{Ending, FaultAnswer, HostPage, Ownership, Pager, Waiter};
use crate::error::Chain;
use crate::guest::{GuestControl, Placer, VcpuThreads};
use crate::observe::{LatencySummary, PageWaits, SharedStatistics, Status};
use crate::ram::{Landing, PageSet};
use crate::stream::native::decode_state_section;
use crate::stream::qemu::incoming::IncomingStream;
use crate::stream::qemu::package::{PING_TAKEN, decode_package};
use crate::stream::qemu::return_path::Message;
use crate::sys::{CancelToken, Lock as _, MissingFaults, Stop};
use crate::transport::{ByteSink, ChannelError};

use self::loading::{NotStarted, load_and_run};
pub use self::shared::MissingPages;
pub(super) use self::shared::{ACK_CHECK_INTERVAL, Shared};
use super::DestinationSession;
use super::owner::Owner;
use super::preempt::{Preempt, UrgentPages};
use super::reads::Reads;
use super::receive::{no_blocks, out_of_turn};
use super::relayed::{Relayed, never_came};
use super::return_path::ReturnPathWriter;
use super::switch::Switch;
use crate::session::Error;
use crate::session::workers::Spawner;

/// Interval between two checks whether the last pages have arrived.
const EXPECTED_CHECK_INTERVAL: Duration = Duration::from_micros(500);

/// The guest's control, returned by the thread that used it.
type Loaded = (Box<dyn GuestControl>, Result<(), Error>);

/// A running postcopy at the destination.
pub(super) struct Postcopy {
    pub(super) shared: Arc<Shared>,
    faults: Option<JoinHandle<()>>,
    /// The missing pages are read here, and not sent.
    pub(super) reads: Option<Reads>,
    loader: Option<JoinHandle<()>>,
    pub(super) preempt: Preempt,
    /// Pages that were discarded at the switchover: each is sent again before the end.
    expected_pages: PageSet,
    /// Another connection exists, and the source has not sent RESUME on it yet.
    pub(super) recovering: bool,
    loaded: Arc<Mutex<Option<Loaded>>>,
    time_to_run: Arc<Mutex<Duration>>,
}

impl Postcopy {
    /// A thread asks the source for pages from here on.
    fn serve_faults(&mut self, spawner: &Spawner) -> Result<(), Error> {
        let serving = Arc::clone(&self.shared);
        self.faults = Some(spawner.spawn("ramwire-faults", Box::new(move || serving.serve_faults()))?);
        Ok(())
    }

    /// Pages are no longer read here: the source sends what is missing, on another connection.
    pub(super) fn end_reads(&mut self, spawner: &Spawner) -> Result<(), Error> {
        let Some(reads) = self.reads.take() else { return Ok(()) };
        *self.shared.pager() = reads.end();
        self.serve_faults(spawner)
    }
}

impl Drop for Postcopy {
    fn drop(&mut self) {
        self.reads = None;
        self.shared.over.cancel();
        self.shared.owner.step(Ownership::give_up);
        self.shared.lose_connection();
        self.preempt.end();
        for thread in [self.loader.take(), self.faults.take()].into_iter().flatten() {
            let _ = thread.join();
        }
    }
}

/// Stands in while the loader has the guest's control.
struct Lent;

impl GuestControl for Lent {
    fn pause(&mut self) -> io::Result<()> {
        Err(lent())
    }

    fn resume(&mut self) -> io::Result<()> {
        Err(lent())
    }
}

fn lent() -> io::Error {
    io::Error::other("the guest is being started by another thread")
}

impl Switch {
    /// The source has sent its last page. Urgent ones may be in flight on their own connection: waits until all that
    /// were discarded have arrived.
    ///
    /// # Errors
    /// Some do not arrive.
    pub(super) fn await_expected_pages(&mut self, stop: &Stop) -> Result<(), Error> {
        let Some(postcopy) = self.running_mut() else { return self.relayed_all(stop) };
        let stop = stop.within(postcopy.shared.send_timeout);
        await_pages(&postcopy.expected_pages, &postcopy.shared.placer, &postcopy.preempt, &stop)?;
        postcopy.expected_pages = PageSet::default();
        Ok(())
    }
}

/// The main connection has received its last page: waits until all of `expected` have arrived on either.
///
/// # Errors
/// Some do not arrive.
pub(super) fn await_pages(
    expected: &PageSet,
    placer: &Placer,
    preempt: &Preempt,
    stop: &Stop,
) -> Result<(), Error> {
    preempt.main_ended();
    loop {
        // Asked first: the last page may come before it ends.
        let more_may_come = preempt.is_expected();
        let missing = expected.runs().find_map(|run| placer.first_missing(run));
        let Some(page) = missing else { return Ok(()) };
        if !more_may_come || stop.sleep(EXPECTED_CHECK_INTERVAL).is_some() {
            return Err(never_came(placer, page));
        }
    }
}

impl DestinationSession {
    /// The package is whole: faults are served, and a thread loads the state and starts the guest.
    pub(super) fn listen(&mut self, stream: &IncomingStream) -> Result<(), Error> {
        let Some(mut advised) = self.switch.take_advised() else {
            return Err(out_of_turn("a package", "a migration without ADVISE"));
        };
        let supply = advised.take_supply();
        let (faults, package, expected_pages) = advised.into_parts();
        let Some(faults) = faults else {
            // A source may switch before its first section of pages.
            self.ingest.pages_begin(*stream.seen(), stream.ram_section_id().unwrap_or_default())?;
            return self.relay_switch(&package, expected_pages, stream.blocks());
        };
        let decoded = decode_package(&package)?;
        let Some(back) = self.wire.back.clone() else {
            return Err(out_of_turn("a package", "a stream without a return path"));
        };
        let placing = self.ingest.placed().ok_or_else(|| no_blocks("a package"))?;
        let faults = Arc::new(faults);
        let (pager, began) = (Arc::new(Mutex::new(Pager::default())), Instant::now());
        self.figures.waiting(&pager);
        let (waits, table) = (Arc::clone(&pager), Arc::clone(placing.memory()));
        let placed = move |landing: Landing| {
            let host =
                table.table().get(landing.block()).map_or(landing.len(), |block| block.host_page.bytes());
            let (mut pager, now) = (waits.locked(), began.elapsed());
            for at in (0..landing.len()).step_by(host as usize) {
                let page = HostPage { block: landing.block(), offset: landing.offset().0 + at };
                pager.placed(now, page);
            }
        };
        let placer = Arc::clone(placing.placer());
        let (mut placed, mut begun) = (Some(Box::new(placed)), Ok(()));
        self.wire.link.begin_missing(self.reported.spread, &mut || {
            if let Some(placed) = placed.take() {
                begun = placer.serve_missing(Arc::clone(&faults), placed);
            }
        })?;
        begun?;
        let shared = Arc::new(Shared {
            placer,
            faults,
            pager,
            vcpus: self.settings.vcpu_threads.clone(),
            back,
            began,
            send_timeout: self.settings.stall_timeout,
            owner: if decoded.pings.contains(&PING_TAKEN) { Owner::default() } else { Owner::here() },
            native: self.driver.engine.is_native(),
            answered: AtomicBool::new(false),
            load_failed: AtomicBool::new(false),
            gave_way: AtomicBool::new(false),
            over: CancelToken::default(),
            connection: Mutex::default(),
            failure: Mutex::default(),
            statistics: self.figures.shared(),
        });
        self.wire.stop = shared.stop();
        let spawner = &self.settings.spawner;
        let reads = supply
            .map(|supply| Reads::start(&shared, &shared.faults, supply, &expected_pages, &self.settings))
            .transpose()?;
        let mut postcopy = Postcopy {
            shared: Arc::clone(&shared),
            faults: None,
            reads,
            loader: None,
            preempt: Preempt::new(
                stream.blocks().clone(),
                self.switch.next().clone(),
                self.settings.spawner.clone(),
            ),
            expected_pages,
            recovering: false,
            loaded: Arc::default(),
            time_to_run: Arc::default(),
        };
        if postcopy.reads.is_none() {
            postcopy.serve_faults(spawner)?;
        }
        postcopy.preempt.start(postcopy.shared.urgent_pages())?;
        let state = self.state_of_package(decoded.sections)?;
        if let Some(incoming) = self.ingest.incoming() {
            self.guest.memory.arrived(incoming, self.driver.engine.is_native());
        }
        self.figures.shared().update(|s| s.status = Status::Device);
        let control = std::mem::replace(&mut self.guest.control, Box::new(Lent));
        let (loaded, time, pings) =
            (Arc::clone(&postcopy.loaded), Arc::clone(&postcopy.time_to_run), decoded.pings);
        let job = move || {
            let mut control = control;
            let done = load_and_run(&shared, &mut control, &state, &pings);
            *time.locked() = shared.now();
            shared.gave_way.store(matches!(done, Err(NotStarted::GivenUp)), Ordering::Release);
            shared.load_failed.store(done.is_err(), Ordering::Release);
            let failed = done.is_err();
            *loaded.locked() = Some((control, done.map_err(Error::from)));
            if failed {
                shared.lose_connection();
            }
        };
        postcopy.loader = Some(self.settings.spawner.spawn("ramwire-load", Box::new(job))?);
        self.switch.begin(postcopy);
        Ok(())
    }

    /// The device state of a package with these sections.
    pub(super) fn state_of_package(&mut self, sections: &[u8]) -> Result<Vec<u8>, Error> {
        if !self.driver.engine.is_native() {
            // As a precopy stream that ends without a VM description.
            return Ok([&self.ingest.take_state()[..], sections, &[0]].concat());
        }
        let missing = || out_of_turn("a package without a section of device state", "a ramwire's switch");
        Ok(decode_state_section(sections).ok_or_else(missing)?.to_vec())
    }

    /// All pages have arrived: waits for the guest's start.
    pub(super) fn await_guest(&mut self) -> Result<(), Error> {
        if self.switch.relayed().is_some() {
            return self.ingest.all_came();
        }
        self.take_control()?;
        let Some(postcopy) = self.switch.running_mut() else { return Ok(()) };
        // No page is requested any more. A fault at a page that has arrived is answered until serving ends, and can't
        // be answered afterwards.
        postcopy.shared.over.cancel();
        if let Some(faults) = postcopy.faults.take() {
            let _ = faults.join();
        }
        if let Some(reads) = postcopy.reads.take() {
            *postcopy.shared.pager() = reads.end();
        }
        if let Some(error) = postcopy.shared.failure.locked().take() {
            return Err(error);
        }
        postcopy.shared.placer.stop_serving();
        Ok(())
    }

    /// Waits for the loader, takes the guest's control back, and returns the result of the start.
    fn take_control(&mut self) -> Result<(), Error> {
        let Some(postcopy) = self.switch.running_mut() else { return Ok(()) };
        if let Some(loader) = postcopy.loader.take() {
            // This thread takes no connection while it waits.
            postcopy.shared.owner.is_on_its_last_connection();
            // A panic of the embedder's code was taken for an error before.
            let _ = loader.join();
        }
        match postcopy.loaded.locked().take() {
            Some((control, done)) => {
                self.guest.control = control;
                done
            }
            None => Ok(()),
        }
    }

    /// A step failed: the error of a thread of the postcopy is the cause, if there is one.
    pub(super) fn postcopy_failure(&mut self, error: Error) -> Error {
        let lost = self.switch.relayed().and_then(Relayed::take_loss);
        if let Some(why) = self.ingest.why_ended().or(lost) {
            return why;
        }
        let failed = |shared: &Shared| shared.load_has_failed() && !shared.gave_way.load(Ordering::Acquire);
        let failed = self.switch.running().is_some_and(|postcopy| failed(&postcopy.shared));
        if failed && let Err(cause) = self.take_control() {
            return cause;
        }
        let Some(postcopy) = self.switch.running() else { return error };
        let read = || postcopy.reads.as_ref().and_then(Reads::take_failure).map(Error::from);
        let failure = postcopy.shared.failure.locked().take();
        failure.or_else(read).unwrap_or(error)
    }

    /// A guest that is not known to be here is not started any more.
    pub(super) fn give_up_guest(&self) {
        if let Some(postcopy) = self.switch.running() {
            postcopy.shared.owner.step(Ownership::give_up);
        }
    }

    /// Ends the threads; returns the figures of the faults.
    pub(super) fn end_postcopy(&mut self, ending: Ending) -> (Option<MissingPages>, u64) {
        self.give_up_guest();
        if let Err(error) = self.take_control() {
            tracing::warn!(error = %Chain(&error), "the guest's start");
        }
        if let Some(relayed) = self.switch.relayed_mut() {
            let (preempt_pages, preempt_bytes) = relayed.finish(ending == Ending::Running);
            return (Some(MissingPages { preempt_pages, ..MissingPages::default() }), preempt_bytes);
        }
        let Some(mut postcopy) = self.switch.take() else { return (None, 0) };
        if ending == Ending::Incomplete {
            // With the last descriptor closed a missing page would read as zero, and the guest would continue with it.
            std::mem::forget(Arc::clone(&postcopy.shared.faults));
        }
        if let Some(reads) = postcopy.reads.take() {
            *postcopy.shared.pager() = reads.end();
        }
        let (preempt_pages, preempt_bytes) = postcopy.preempt.finish(&postcopy.shared.urgent_pages());
        let (faults, requests) = postcopy.shared.pager().counts();
        let latency = postcopy.shared.pager().latency().summary();
        let waits = postcopy.shared.pager().waits();
        let time_to_run = *postcopy.time_to_run.locked();
        (Some(MissingPages { faults, requests, latency, waits, preempt_pages, time_to_run }), preempt_bytes)
    }
}
