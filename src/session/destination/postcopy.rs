//! The guest runs here while pages are missing.
//!
//! Three threads work side by side from the package on: the session's own reads the main connection and places pages;
//! `ramwire-load` loads the device state and starts the guest; `ramwire-faults` waits for faults and sends requests. A
//! request needs nothing but the return path: it waits for no batch and for no page that is being placed.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use std::os::fd::AsFd;

use crate::engine::{FaultAnswer, HostPage, Pager};
use crate::error::{Chain, Remedy};
use crate::guest::{GuestControl, Placer, ServeError};
use crate::observe::{LatencySummary, SharedStatistics, Status};
use crate::ram::{Landing, RamBlockTable};
use crate::stream::native::decode_state_section;
use crate::stream::qemu::command::Discard;
use crate::stream::qemu::package::{PING_TAKEN, decode_package};
use crate::stream::qemu::return_path::Message;
use crate::sys::{CancelToken, MissingFaults, Stop};
use crate::transport::{ByteSink, ChannelError};
use crate::units::BlockOffset;

use super::DestinationSession;
use super::receive::{no_blocks, out_of_turn};
use super::return_path::ReturnPathWriter;
use crate::session::Error;
use crate::session::callback::guarded;

/// Between two checks whether the source's host has acknowledged an answer.
const ACK_CHECK_INTERVAL: Duration = Duration::from_micros(200);

/// What faults of missing pages came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MissingPages {
    /// Faults that were reported: threads that had to wait for a page.
    pub faults: u64,
    /// Requests that were sent for them.
    pub requests: u64,
    /// From the fault to the page in place.
    pub latency: LatencySummary,
    /// From the package's last byte until the guest was started.
    pub time_to_run: Duration,
}

/// What the threads of a postcopy share.
pub(super) struct Shared {
    pub(super) placer: Arc<Placer>,
    faults: Arc<MissingFaults>,
    pager: Arc<Mutex<Pager>>,
    pub(super) back: ReturnPathWriter,
    began: Instant,
    pub(super) send_timeout: Duration,
    /// The source does not let the guest run again, whatever becomes of the connection.
    is_ours: AtomicBool,
    /// The device state could not be loaded, or the guest not started.
    load_failed: AtomicBool,
    /// Raised at the end of all.
    over: CancelToken,
    /// Raised when the present connection is of no more use.
    connection: Mutex<CancelToken>,
    failure: Mutex<Option<Error>>,
    statistics: SharedStatistics,
}

impl Shared {
    pub(super) fn pager(&self) -> MutexGuard<'_, Pager> {
        self.pager.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// What no other connection mends.
    fn fail(&self, error: Error) {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.lose_connection();
    }

    fn lose_connection(&self) {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).cancel();
    }

    /// Ends waits on the present connection.
    pub(super) fn stop(&self) -> Stop {
        Stop::on(&self.connection.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the source's host has the answer that makes the guest ours: without it that source lets its guest run on.
    fn delivered(&self, value: u32, stop: &Stop) -> Result<(), ChannelError> {
        let stop = stop.within(self.send_timeout);
        while value == PING_TAKEN && self.back.unacknowledged() > 0 {
            if let Some(reason) = stop.sleep(ACK_CHECK_INTERVAL) {
                return Err(ChannelError::Stopped {
                    reason,
                    doing: "waiting until the source has our answer",
                });
            }
        }
        Ok(())
    }

    /// Another connection is there.
    pub(super) fn reconnected(&self, back: Box<dyn ByteSink>) {
        *self.connection.lock().unwrap_or_else(PoisonError::into_inner) = CancelToken::default();
        self.back.replace(Some(back));
    }

    /// True if another connection would be of no use.
    pub(super) fn has_failed(&self) -> bool {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Serves faults until all is over.
    fn serve_faults(&self) {
        let stop = Stop::on(&self.over);
        while let Ok(None) = stop.wait(self.faults.as_fd(), PollFlags::IN) {
            if let Err(error) = self.serve_all() {
                self.fail(error);
                return;
            }
        }
    }

    fn serve_all(&self) -> Result<(), Error> {
        let reading = |source: io::Error| Error::Control { what: "read the faults of missing pages", source };
        while let Some(fault) = self.faults.next().map_err(reading)? {
            let Some(landing) = self.placer.host_page_at(fault) else { continue };
            let answer = self.pager().fault(self.now(), host_page(landing), || self.placer.has_all(landing));
            match answer {
                FaultAnswer::Received => self.placer.answer_received(landing)?,
                FaultAnswer::Wait => {}
                FaultAnswer::Ask => self.ask(landing),
            }
        }
        Ok(())
    }

    /// A request that can't be sent stays outstanding: it is sent on the next connection.
    fn ask(&self, landing: Landing) {
        let stop = self.stop().within(self.send_timeout);
        if let Err(error) = self.back.ask(&self.placer, landing, &stop) {
            tracing::warn!(%error, "a missing page could not be asked for");
            self.lose_connection();
        }
    }
}

fn host_page(landing: Landing) -> HostPage {
    HostPage { block: landing.block(), offset: landing.offset().0 }
}

/// The guest's control comes back with the thread that used it.
type Loaded = (Box<dyn GuestControl>, Result<(), Error>);

/// A postcopy under way at the destination.
pub(super) struct Postcopy {
    pub(super) shared: Arc<Shared>,
    faults: Option<JoinHandle<()>>,
    loader: Option<JoinHandle<()>>,
    /// Another connection is there, and the source has not said RESUME on it yet.
    pub(super) recovering: bool,
    loaded: Arc<Mutex<Option<Loaded>>>,
    time_to_run: Arc<Mutex<Duration>>,
}

impl Drop for Postcopy {
    fn drop(&mut self) {
        self.shared.over.cancel();
        self.shared.lose_connection();
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

    fn save_devices(&mut self, _out: &mut dyn io::Write) -> io::Result<()> {
        Err(lent())
    }

    fn load_devices(&mut self, _from: &mut dyn io::Read) -> io::Result<()> {
        Err(lent())
    }
}

fn lent() -> io::Error {
    io::Error::other("the guest is being started by another thread")
}

impl DestinationSession {
    /// The source may switch to postcopy: what that needs is tried before the first page comes.
    pub(super) fn advised(&mut self, host_pages: u64) -> Result<(), Error> {
        if self.source.rounds().is_some() {
            return Err(Error::Config {
                what: "the source may switch to postcopy, and pages come by RDMA into registered memory"
                    .into(),
                remedy: Remedy::Advice("turn postcopy-ram off at the source, or let it come over TCP"),
            });
        }
        self.missing_faults = Some((
            MissingFaults::new()
                .or_else(|error| {
                    tracing::debug!(error = %Chain(&error), "faults of user mode only are served");
                    MissingFaults::user_mode_only()
                })
                .map_err(ServeError::from)?,
            host_pages,
        ));
        Ok(())
    }

    /// The source's host page sizes must be ours, or pages would be placed in parts.
    pub(super) fn check_host_pages(&self, table: &RamBlockTable) -> Result<(), Error> {
        let Some((_, theirs)) = &self.missing_faults else { return Ok(()) };
        let used = table.blocks().iter().filter(|block| !block.flags.ignored);
        let ours = used.fold(0, |all, block| all | block.host_page.bytes());
        if ours == *theirs {
            return Ok(());
        }
        Err(Error::Config {
            what: format!(
                "the source's RAM is in pages of {theirs:#x} bytes (sizes ORed), here in pages of {ours:#x}"
            ),
            remedy: Remedy::Advice(
                "give both ends the same huge pages, or turn postcopy-ram off at the source",
            ),
        })
    }

    /// A piece of the package.
    pub(super) fn package_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if (self.package.len() + bytes.len()) as u64 > self.settings.max_state {
            return Err(out_of_turn("more device state than is accepted", "a switchover to postcopy"));
        }
        self.package.extend_from_slice(bytes);
        Ok(())
    }

    /// A discard at the switchover: these pages come again.
    pub(super) fn discard(&mut self, discard: Discard<'_>) -> Result<(), Error> {
        let refused =
            |why: String| out_of_turn(&format!("POSTCOPY_RAM_DISCARD, {why}"), "a switchover to postcopy");
        if self.missing_faults.is_none() || self.postcopy.is_some() {
            return Err(refused("before ADVISE, or after the package".into()));
        }
        let placer = Arc::clone(self.placing()?.placer());
        let table = placer.memory().table();
        let index = table.find(discard.block()).map_err(|error| refused(error.to_string()))?;
        let page = table.get(index).map_or(table.page(), |block| block.host_page).bytes();
        for (start, length) in discard.ranges() {
            if start % page != 0 || length % page != 0 {
                return Err(refused(format!(
                    "{length} bytes at {start:#x} are not whole pages of {page} bytes"
                )));
            }
            let landing =
                table.admit(index, BlockOffset(start), length).map_err(|error| refused(error.to_string()))?;
            placer.forget(landing)?;
        }
        Ok(())
    }

    /// The package is whole: faults are served, and a thread loads the state and starts the guest.
    pub(super) fn listen(&mut self) -> Result<(), Error> {
        let package = std::mem::take(&mut self.package);
        let decoded = decode_package(&package)?;
        let Some((faults, _)) = self.missing_faults.take() else {
            return Err(out_of_turn("a package", "a migration without ADVISE"));
        };
        let Some(back) = self.back.take() else {
            return Err(out_of_turn("a package", "a stream without a return path"));
        };
        let back = ReturnPathWriter::new(back);
        self.back = Some(Box::new(back.clone()));
        let placing = self.placing.as_ref().ok_or_else(|| no_blocks("a package"))?;
        let faults = Arc::new(faults);
        let (pager, began) = (Arc::new(Mutex::new(Pager::default())), Instant::now());
        let waits = Arc::clone(&pager);
        let placed = move |landing: Landing| {
            let mut pager = waits.lock().unwrap_or_else(PoisonError::into_inner);
            pager.placed(began.elapsed(), host_page(landing));
        };
        placing.placer().serve_missing(Arc::clone(&faults), Box::new(placed))?;
        let shared = Arc::new(Shared {
            placer: Arc::clone(placing.placer()),
            faults,
            pager,
            back,
            began,
            send_timeout: self.settings.stall_timeout,
            is_ours: AtomicBool::new(!decoded.pings.contains(&PING_TAKEN)),
            load_failed: AtomicBool::new(false),
            over: CancelToken::default(),
            connection: Mutex::default(),
            failure: Mutex::default(),
            statistics: self.statistics.clone(),
        });
        self.stop = shared.stop();
        let serving = Arc::clone(&shared);
        let faults =
            self.settings.spawner.spawn("ramwire-faults", Box::new(move || serving.serve_faults()))?;
        let mut postcopy = Postcopy {
            shared: Arc::clone(&shared),
            faults: Some(faults),
            loader: None,
            recovering: false,
            loaded: Arc::default(),
            time_to_run: Arc::default(),
        };
        let state = if self.engine.is_native() {
            decode_state_section(decoded.sections)
                .ok_or_else(|| {
                    out_of_turn("a package without a section of device state", "a ramwire's switch")
                })?
                .to_vec()
        } else {
            // As a precopy stream that ends without a VM description.
            [&std::mem::take(&mut self.state)[..], decoded.sections, &[0]].concat()
        };
        if let Some(incoming) = &self.incoming {
            self.provider.arrived(incoming, self.engine.is_native());
        }
        self.statistics.update(|s| s.status = Status::Device);
        let control = std::mem::replace(&mut self.control, Box::new(Lent));
        let (loaded, time, pings) =
            (Arc::clone(&postcopy.loaded), Arc::clone(&postcopy.time_to_run), decoded.pings);
        let job = move || {
            let mut control = control;
            let done = load_and_run(&shared, &mut control, &state, &pings);
            *time.lock().unwrap_or_else(PoisonError::into_inner) = shared.now();
            shared.load_failed.store(done.is_err(), Ordering::Release);
            let failed = done.is_err();
            *loaded.lock().unwrap_or_else(PoisonError::into_inner) = Some((control, done));
            if failed {
                shared.lose_connection();
            }
        };
        postcopy.loader = Some(self.settings.spawner.spawn("ramwire-load", Box::new(job))?);
        self.postcopy = Some(postcopy);
        Ok(())
    }

    /// All pages have come: waits for the guest's start.
    pub(super) fn await_guest(&mut self) -> Result<(), Error> {
        self.take_control()?;
        let Some(postcopy) = &self.postcopy else { return Ok(()) };
        if let Some(error) = postcopy.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(error);
        }
        postcopy.shared.placer.stop_serving();
        Ok(())
    }

    /// Waits for the loader, takes the guest's control back, and says how the start went.
    fn take_control(&mut self) -> Result<(), Error> {
        let Some(postcopy) = &mut self.postcopy else { return Ok(()) };
        if let Some(loader) = postcopy.loader.take() {
            // A panic of the embedder's code was taken for an error before.
            let _ = loader.join();
        }
        match postcopy.loaded.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some((control, done)) => {
                self.control = control;
                done
            }
            None => Ok(()),
        }
    }

    /// No cancel ends what the source gave away; the failure of a postcopy's thread does.
    pub(super) fn stop_after_commit(&self) -> Stop {
        self.postcopy.as_ref().map_or_else(Stop::never, |postcopy| postcopy.shared.stop())
    }

    /// True if the guest runs here, or is about to, although pages are missing.
    pub(super) fn guest_is_ours(&self) -> bool {
        let Some(Postcopy { shared, .. }) = &self.postcopy else { return false };
        shared.is_ours.load(Ordering::Acquire) && !shared.load_failed.load(Ordering::Acquire)
    }

    /// A step failed: what a thread of the postcopy says is the cause, where one does.
    pub(super) fn postcopy_failure(&mut self, error: Error) -> Error {
        if self.stop.reason().is_some()
            && let Err(cause) = self.take_control()
        {
            return cause;
        }
        let Some(postcopy) = &self.postcopy else { return error };
        postcopy.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or(error)
    }

    /// Ends the threads; what faults came to.
    pub(super) fn end_postcopy(&mut self) -> Option<MissingPages> {
        if let Err(error) = self.take_control() {
            tracing::warn!(error = %Chain(&error), "the guest's start");
        }
        let postcopy = self.postcopy.take()?;
        let (faults, requests) = postcopy.shared.pager().counts();
        let latency = postcopy.shared.pager().latency().summary();
        let time_to_run = *postcopy.time_to_run.lock().unwrap_or_else(PoisonError::into_inner);
        Some(MissingPages { faults, requests, latency, time_to_run })
    }
}

fn load_and_run(
    shared: &Shared,
    control: &mut Box<dyn GuestControl>,
    state: &[u8],
    pings: &[u32],
) -> Result<(), Error> {
    let loaded = guarded("loading the device state", || control.load_devices(&mut &state[..]))?;
    loaded.map_err(|source| Error::Control { what: "load its device state", source })?;
    let stop = shared.stop();
    for value in pings {
        let said = shared.back.message(Message::Pong(*value), &stop.within(shared.send_timeout));
        // A source that does not wait for this answer has given the guest away by the package.
        if let Err(error) = said.and_then(|()| shared.delivered(*value, &stop))
            && !shared.is_ours.load(Ordering::Acquire)
        {
            return Err(error.into());
        }
    }
    shared.is_ours.store(true, Ordering::Release);
    // A connection that was lost meanwhile says so itself.
    shared.statistics.update(|s| {
        if s.status == Status::Device {
            s.status = Status::PostcopyActive;
        }
    });
    let started = guarded("starting the guest", || control.resume())?;
    started.map_err(|source| Error::Control { what: "resume", source })
}
