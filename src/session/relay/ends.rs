//! The session towards the far end, and what the one towards the source reports as the guest comes: each waits for what
//! the engine lets it do.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;

use crate::engine::{FarEnd, Handover, Outcome, PostcopyRule, RelayAction, RelayEvent, Traffic};
use crate::error::Remedy;
use crate::guest::{DeviceState, DirtySource, GuestControl, GuestMemory, PageObserver};
use crate::observe::SharedStatistics;
use crate::session::destination::{Incoming, IncomingObserver, Switched};
use crate::session::source::{News, Reconnect, SourceGuest, SourceReport, SourceSession, Upstream};
use crate::session::{Error, PostcopySettings, SourceSettings};
use crate::sys::{CancelToken, Lock as _, duplicate};

use super::forward::ForwardedPages;
use super::hub::{Hub, Inner};
use super::postcopy::{FarSwitch, Settled, SwitchedSource, why_ended};
use super::{ConnectFn, Notice, NoticeFn};

/// Longest time between two checks of the far end's figures while pages arrive.
const FIGURES_INTERVAL: Duration = Duration::from_millis(2);

/// Pages that may arrive between two checks: 256 KiB of small ones.
const MEASURE_PAGES: u64 = 64;

/// Interval between two checks for a cancel and of the source's connection, while waiting for the other side.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Number of pages for which an idle far side begins a round immediately; with fewer it waits for more, at most a
/// slice.
const WORTH_A_ROUND: u64 = 256;

/// The far side's session after its end.
pub(super) struct FarReport {
    pub(super) report: SourceReport,
    pub(super) began: Instant,
    pub(super) first_page_sent: Option<Duration>,
}

/// Observes the pages that arrive, and starts the far side with the first of them.
pub(super) struct Middle {
    pub(super) hub: Arc<Hub>,
    pub(super) connect: Option<Box<ConnectFn>>,
    pub(super) outgoing: Option<SourceSettings>,
    pub(super) give: Option<Sender<FarReport>>,
    pub(super) cancel: CancelToken,
    pub(super) notice: Arc<NoticeFn>,
    /// Figures of what arrived, and of what was sent.
    pub(super) came: SharedStatistics,
    pub(super) left: SharedStatistics,
    pub(super) began: Instant,
    pub(super) ram_complete: Arc<Mutex<Option<Duration>>>,
    pub(super) forwarded: Option<Arc<ForwardedPages>>,
    pub(super) meter: Option<Meter>,
    /// The source has a connection for urgent pages, which nobody here reads.
    pub(super) urgent_came: bool,
    /// Makes the far end's connection for urgent pages.
    pub(super) urgent: Option<Box<dyn Reconnect>>,
    /// The source is told nothing any more.
    pub(super) silenced: Arc<AtomicBool>,
}

/// Measures the pages that wait to be sent on.
pub(super) struct Meter {
    forwarded: Arc<ForwardedPages>,
    came: SharedStatistics,
    left: SharedStatistics,
    page_bytes: u64,
    measured_at: Instant,
    waiting: u64,
    /// The source has a return path.
    source_can_be_told: bool,
}

impl Meter {
    /// True if enough has changed since the last check.
    fn is_due(&self) -> bool {
        self.measured_at.elapsed() >= FIGURES_INTERVAL
            || self.forwarded.pending() >= self.waiting + MEASURE_PAGES
    }

    fn measure(&mut self, queued: u64) -> Traffic {
        self.measured_at = Instant::now();
        self.waiting = self.forwarded.pending();
        let whole_came = self.came.read(|s| s.pages.normal + s.pages.delta);
        self.left.read(|s| Traffic {
            page_bytes: self.page_bytes,
            waiting: self.waiting + s.remaining / self.page_bytes,
            whole_came,
            whole_left: s.pages.normal + s.pages.delta,
            acknowledged: s.transferred.saturating_sub(queued),
        })
    }
}

impl Middle {
    fn start_far_side(
        &mut self,
        incoming: &Incoming,
        memory: &Arc<dyn GuestMemory>,
        section: u32,
    ) -> Result<(), Error> {
        let (Some(connect), Some(mut settings), Some(give), Some(forwarded)) =
            (self.connect.take(), self.outgoing.take(), self.give.take(), self.forwarded.clone())
        else {
            return Ok(());
        };
        if incoming.gives_unasked {
            (self.notice)(&Notice::NoReturnPath);
        }
        settings.adopt(incoming);
        settings.all_dirty_at_start = false;
        if incoming.seen.postcopy_advised {
            let mut postcopy = PostcopySettings::new(PostcopyRule::OnCommand);
            postcopy.preempt = self.urgent.is_some();
            settings.postcopy = Some(postcopy);
            settings.ram_section = section;
        }
        let finish_timeout = settings.finish_timeout;
        let connection = connect(Arc::clone(memory))?;
        let back = connection.back.as_ref();
        let descriptor = back.and_then(|back| back.descriptor());
        self.hub.far_end_connects(
            descriptor.and_then(|descriptor| duplicate(&descriptor).ok()),
            back.is_some_and(|back| back.is_encrypted()),
        );
        if incoming.seen.postcopy_advised && self.hub.is_encrypted() {
            return Err(no_encrypted_postcopy());
        }
        self.meter = Some(Meter {
            forwarded: Arc::clone(&forwarded),
            came: self.came.clone(),
            left: self.left.clone(),
            page_bytes: memory.table().page().bytes(),
            measured_at: Instant::now(),
            waiting: 0,
            source_can_be_told: incoming.has_return_path,
        });
        let guest = SourceGuest {
            memory: Arc::clone(memory),
            dirty: vec![Arc::clone(&forwarded) as Arc<dyn DirtySource>],
            control: Box::new(StateOfSource(Arc::clone(&self.hub))),
        };
        let spawner = settings.spawner.clone();
        let mut session = SourceSession::new(guest, connection, settings)
            .with_upstream(Box::new(FarSide {
                hub: Arc::clone(&self.hub),
                forwarded,
                memory: Arc::clone(memory),
                finish_timeout,
            }))
            .with_cancel(self.cancel.clone())
            .with_statistics(self.left.clone());
        if let Some(urgent) = self.urgent.take() {
            session = session.with_reconnect(urgent);
        }
        self.hub.far_side_starts(session.control());
        let (ended, hub) = (FarSideEnds(Arc::clone(&self.hub)), Arc::clone(&self.hub));
        let far_side = move || {
            let began = Instant::now();
            let report = session.run();
            let first_page_sent = report.first_page_sent;
            ended.with(&report);
            // The receiver is gone only if the relay itself is.
            let _ = give.send(FarReport { report, began, first_page_sent });
            hub.await_source();
        };
        spawner.spawn("ramwire-far", Box::new(far_side))?;
        Ok(())
    }
}

/// Reports to the engine that the far side has ended, also if it panics.
struct FarSideEnds(Arc<Hub>);

impl FarSideEnds {
    fn with(self, report: &SourceReport) {
        if let Some(error) = &report.error {
            self.0.because(error);
        }
        self.0.post(RelayEvent::FarEnded(match report.outcome {
            Outcome::Completed => FarEnd::Runs,
            Outcome::StaysHere(_) => FarEnd::DoesNotRun,
            Outcome::InDoubt | Outcome::Incomplete => FarEnd::Unknown,
        }));
    }
}

impl Drop for FarSideEnds {
    fn drop(&mut self) {
        // No effect if the end was already reported.
        self.0.post(RelayEvent::FarEnded(FarEnd::Unknown));
    }
}

impl IncomingObserver for Middle {
    fn began(
        &mut self,
        incoming: &Incoming,
        memory: &Arc<dyn GuestMemory>,
        section: u32,
    ) -> Result<(), Error> {
        self.start_far_side(incoming, memory, section)
    }

    fn watch(&mut self, memory: &Arc<dyn GuestMemory>) -> Arc<dyn PageObserver> {
        let forwarded = Arc::new(ForwardedPages::new(memory.table()));
        self.forwarded = Some(Arc::clone(&forwarded));
        forwarded
    }

    /// Stops reading from the source while the far end's backlog is too long.
    ///
    /// # Errors
    /// The far side has ended: further pages can't be passed on, and the source can receive an error.
    fn between_reads(&mut self) -> Result<(), Error> {
        let Some(meter) = &mut self.meter else { return Ok(()) };
        if !meter.is_due() {
            return Ok(());
        }
        loop {
            self.hub.post_quietly(RelayEvent::Moved(meter.measure(self.hub.queued())));
            let mut inner = self.hub.lock();
            if inner.has(RelayAction::TellFailed) && meter.source_can_be_told {
                return Err(Error::PeerFailed { why: format!("the far end of the relay: {}", inner.why()) });
            }
            // Otherwise the source may have written its last byte already and released its guest: the received bytes
            // must be kept.
            inner.held_back = !inner.may_read();
            let held_back = inner.held_back;
            drop(inner);
            if held_back || meter.waiting >= WORTH_A_ROUND {
                self.hub.notify();
            }
            if !held_back {
                return Ok(());
            }
            if self.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            std::thread::sleep(FIGURES_INTERVAL);
        }
    }

    fn ram_complete(&mut self, scan: Option<Duration>) -> Result<(), Error> {
        *self.ram_complete.locked() = Some(self.began.elapsed());
        if let Some(took) = scan {
            self.left.update(|s| s.downtime_parts.scan_ms = took.as_secs_f64() * 1e3);
        }
        self.hub.post(RelayEvent::RamComplete);
        Ok(())
    }

    fn relays_postcopy(&self) -> Result<bool, Error> {
        if self.urgent_came { Err(no_urgent_channel()) } else { Ok(true) }
    }

    fn switched(&mut self, switched: Switched) -> Result<(), Error> {
        if let Some(forwarded) = &self.forwarded {
            forwarded.switch();
        }
        SwitchedSource(&self.hub).hand_on(switched)
    }

    fn source_ends(&self) -> CancelToken {
        self.hub.source_ends()
    }

    fn all_came(&mut self) -> Result<(), Error> {
        *self.ram_complete.locked() = Some(self.began.elapsed());
        SwitchedSource(&self.hub).await_end()
    }

    fn settle(&self) {
        if SwitchedSource(&self.hub).settle() == Settled::Nothing {
            self.silenced.store(true, Ordering::Release);
        }
    }

    fn source_may_be_silent(&self) -> bool {
        self.hub.lock().engine.source_may_be_silent()
    }

    fn is_taken(&self) -> bool {
        let inner = self.hub.lock();
        // A source that waits for no answer has given its guest away without one.
        let taken = inner.has(RelayAction::TellTaken) || inner.has(RelayAction::Part);
        taken && !inner.has(RelayAction::TellFailed)
    }

    fn has_moved(&self) -> bool {
        self.hub.lock().has(RelayAction::TellRunning)
    }

    fn why_ended(&self) -> Option<Error> {
        why_ended(&self.hub.lock())
    }
}

/// The source would send urgent pages on a connection of their own.
fn no_urgent_channel() -> Error {
    Error::Config {
        what: "a second connection came with the source's, which is for urgent pages (postcopy-preempt), and this relay takes \
               none"
            .into(),
        remedy: Remedy::AlignUrgent,
    }
}

/// Should the relay be killed after the switch, its guardian would have to tell the source that its guest was taken.
fn no_encrypted_postcopy() -> Error {
    Error::Config {
        what: "the source may switch to postcopy, and through a relay it can't with TLS on either side"
            .into(),
        remedy: Remedy::Advice("turn postcopy-ram off at the source, or leave TLS out at the relay"),
    }
}

/// The far side's session's view of the relay. It continues as soon as there is enough to send, so that the last pages
/// are sent while further ones still arrive.
struct FarSide {
    hub: Arc<Hub>,
    forwarded: Arc<ForwardedPages>,
    memory: Arc<dyn GuestMemory>,
    finish_timeout: Duration,
}

impl Upstream for FarSide {
    fn wait(&mut self, time: Duration) -> Result<News, Error> {
        let inner = self.hub.wait(time, |inner| {
            let pending = self.forwarded.pending();
            inner.has(RelayAction::SendLastRound)
                || inner.has(RelayAction::SendSwitch)
                || inner.has(RelayAction::Abandon)
                || pending >= WORTH_A_ROUND
                || inner.held_back && pending > 0
        });
        if inner.has(RelayAction::Abandon) {
            return Err(source_lost());
        }
        let (stopped, switched) = (inner.has(RelayAction::SendLastRound), inner.has(RelayAction::SendSwitch));
        drop(inner);
        if stopped {
            return Ok(News::Stopped);
        }
        let table = self.memory.table();
        let begun =
            switched.then(|| FarSwitch::begin(&self.hub, &self.forwarded, table, self.finish_timeout));
        Ok(begun.flatten().map_or(News::None, |behind| News::Switched(Box::new(behind))))
    }

    fn wait_for_ownership(&mut self, handover: Handover, time: Duration) -> Result<bool, Error> {
        if !self.hub.lock().far_is_ready {
            self.hub.far_end_takes(handover);
            self.hub.post(RelayEvent::FarReady);
        }
        let over = |inner: &super::hub::Inner| inner.has(RelayAction::Abandon);
        let inner = self.hub.wait(time, |inner| inner.has(RelayAction::GiveAway) || over(inner));
        if over(&inner) {
            return Err(source_lost());
        }
        Ok(inner.has(RelayAction::GiveAway))
    }

    fn far_end_is_silent(&mut self, why: &Error) {
        self.hub.because(why);
        self.hub.post(RelayEvent::FarSilent);
    }

    fn still_listens(&mut self) -> bool {
        !self.hub.lock().has(RelayAction::Abandon)
    }
}

pub(super) fn source_lost() -> Error {
    Error::PeerFailed { why: "the guest's source ended its migration; the guest runs on there".into() }
}

/// The far side's guest: it was paused before it arrived here, and its device state comes from its source.
struct StateOfSource(Arc<Hub>);

impl GuestControl for StateOfSource {
    /// The relay's own memory stays as it is.
    fn forbid_discard(&mut self, _forbid: bool) -> bool {
        true
    }

    fn pause(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn resume(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for StateOfSource {
    /// The source's own session limits the wait.
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        let may_leave =
            |inner: &Inner| inner.has(RelayAction::SendState) || inner.has(RelayAction::SendSwitch);
        loop {
            let inner =
                self.0.wait(POLL_INTERVAL, |inner| may_leave(inner) || inner.has(RelayAction::Abandon));
            match &inner.device_state {
                _ if inner.has(RelayAction::Abandon) => return Err(io::Error::other(source_lost())),
                Some(state) if may_leave(&inner) => return out.write_all(state),
                _ => {}
            }
        }
    }
}
