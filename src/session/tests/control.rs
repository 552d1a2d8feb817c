//! Everything that may change while a migration runs is changed while one runs, and has its effect. These tests are
//! paced by the number of the round, reported at its end.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::{Machine, ends, guest, plain};
use crate::engine::{Ending, Outcome, PostcopyRule, ThrottlePolicy};
use crate::guest::{DeviceState, DirtyError, DirtySource, GuestControl, MappedGuest};
use crate::observe::EventKind;
use crate::ram::{PageBitmap, PageRun};
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::transport::{DeltaCacheSize, InlineLink};
use crate::units::{BlockIndex, Percent, RestShare};

const PAGES: u64 = 64;
/// No test needs as many rounds: the change had no effect.
const TOO_MANY: u32 = 200;

/// A guest that writes each of its pages between two syncs.
struct Busy(Arc<MappedGuest>, AtomicU64);

impl DirtySource for Busy {
    fn name(&self) -> &'static str {
        "busy"
    }
    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }
    fn start(&self) -> Result<(), DirtyError> {
        Ok(())
    }
    fn begin_sync(&self) -> Result<(), DirtyError> {
        let round = self.1.fetch_add(1, Ordering::Relaxed);
        for page in 0..PAGES {
            let span = self.0.region(BlockIndex(0)).unwrap().span(page * 4096, 8).unwrap();
            span.copy_from(&(page + round + 1).to_ne_bytes());
        }
        Ok(())
    }
    fn sync_into(&self, _block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
        into.set_range(0..PAGES);
        Ok(())
    }
    fn reprotect(&self, _run: PageRun) -> Result<(), DirtyError> {
        Ok(())
    }
    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

/// Writes down how it is slowed down.
struct Slowed {
    machine: Machine,
    shares: Arc<Mutex<Vec<u8>>>,
    vcpus: Vec<u64>,
}

impl GuestControl for Slowed {
    fn pause(&mut self) -> io::Result<()> {
        self.machine.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        self.machine.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        self.machine.devices()
    }
    fn throttle(&mut self, share: Percent) {
        self.shares.lock().unwrap().push(share.get());
    }
    fn vcpu_dirty_pages(&mut self) -> Vec<u64> {
        // More than any quota.
        self.vcpus.iter_mut().for_each(|pages| *pages += 1 << 30);
        self.vcpus.clone()
    }
    fn throttle_vcpu(&mut self, _vcpu: usize, rest: RestShare) {
        // Beyond every share.
        self.shares.lock().unwrap().push(if rest == RestShare::default() { 200 } else { 201 });
    }
}

/// Each look at it is a tenth of a second later.
#[derive(Default)]
struct Ticks(AtomicU64);

impl Clock for Ticks {
    fn now(&self) -> Duration {
        Duration::from_millis(100 * self.0.fetch_add(1, Ordering::Relaxed))
    }
}

/// Moves a busy guest that never fits its downtime limit of nothing. `at_round` is called at the end of each round.
fn moved(
    vcpus: usize,
    at_round: impl FnMut(u32, &Control, &[u8]) + Send + 'static,
) -> (SourceReport, Vec<u8>) {
    moved_with(vcpus, None, at_round)
}

fn moved_with(
    vcpus: usize,
    postcopy: Option<PostcopySettings>,
    mut at_round: impl FnMut(u32, &Control, &[u8]) + Send + 'static,
) -> (SourceReport, Vec<u8>) {
    let (near, far) = UnixStream::pair().unwrap();
    let (from, to) = (guest(&[PAGES]), guest(&[PAGES]));
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.downtime_limit = Duration::ZERO;
    settings.verify = if postcopy.is_none() { Verify::Full } else { Verify::Off };
    let switches = postcopy.is_some();
    settings.postcopy = postcopy;
    let shares = Arc::new(Mutex::new(Vec::new()));
    let machine = Machine::running(b"");
    let control =
        Box::new(Slowed { machine: machine.clone(), shares: Arc::clone(&shares), vcpus: vec![0; vcpus] });
    let dirty: Vec<Arc<dyn DirtySource>> = vec![Arc::new(Busy(from.clone(), AtomicU64::new(0)))];
    let link = InlineLink::new(plain(&near), from.clone()).with_deltas(DeltaCacheSize::new(0));
    let connection = SourceConnection::new(Box::new(link), Some(plain(&near)));
    let guest = SourceGuest { memory: from.clone(), dirty, control };
    let mut source = SourceSession::new(guest, connection, settings);
    source.count_time_by(Box::new(Ticks::default()));
    let (told, control) = (Arc::clone(&shares), source.control());
    source.statistics().listen(move |event| {
        let EventKind::Round(round) = &event.kind else { return };
        at_round(round.round, &control, &told.lock().unwrap().clone());
        if round.round > TOO_MANY {
            let _ = control.cancel();
        }
    });
    let destination = DestinationSession::new(
        DestinationGuest { memory: Box::new(to.clone()), control: Box::new(Machine::default()) },
        DestinationConnection::of_stream(plain(&far), Some(plain(&far))),
        DestinationSettings { postcopy: switches, ..DestinationSettings::default() },
    );
    drop((near, far));
    let destination = destination.spawn().unwrap();
    let sent = source.run();
    let arrived = destination.wait().unwrap();
    if sent.outcome == Outcome::Completed {
        assert_eq!(arrived.ending, Ending::Running, "{:?}", arrived.error);
        assert_eq!(super::bytes(&from, 0), super::bytes(&to, 0));
    }
    let shares = shares.lock().unwrap().clone();
    (sent, shares)
}

const AN_HOUR: Duration = Duration::from_secs(3600);

#[test]
fn a_downtime_limit_that_is_raised_counts_from_the_next_sync_on() {
    let (sent, _) = moved(0, |round, control, _| {
        if round == 7 {
            assert_eq!(control.downtime_limit(), Duration::ZERO);
            control.set_downtime_limit(AN_HOUR);
        }
    });
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
    assert_eq!(sent.statistics.round_count(), 8, "seven live ones and the last");
}

#[test]
fn a_downtime_limit_that_is_lowered_keeps_the_guest_running() {
    let (sent, _) = moved(0, |_, control, _| control.set_downtime_limit(AN_HOUR));
    assert_eq!((sent.outcome, sent.statistics.round_count()), (Outcome::Completed, 2), "{:?}", sent.error);
    let (sent, _) = moved(0, |round, control, _| match round {
        1 => {
            control.set_downtime_limit(AN_HOUR);
            control.set_downtime_limit(Duration::ZERO);
        }
        9 => assert_eq!(control.cancel(), CancelReply::Accepted),
        _ => {}
    });
    assert!(sent.guest_is_safe_here(), "{:?}", sent.error);
    assert_eq!(sent.statistics.round_count(), 9);
    assert_eq!(sent.error.unwrap().kind(), ErrorKind::Cancelled);
}

/// The guest is slowed down, more and more; then no more than was asked; then not at all; then by vCPU.
#[test]
fn throttling_is_turned_on_changed_and_off_while_pages_travel() {
    let percent = |value| Percent::new(value).unwrap();
    let mut step = 0;
    let (sent, told) = moved(2, move |_, control, told| {
        let last = told.last().copied();
        match step {
            0 => control.set_throttling(Some(ThrottlePolicy::auto_converge())).unwrap(),
            1 if last == Some(40) => {
                let lower = ThrottlePolicy::AutoConverge {
                    initial: percent(20),
                    increment: percent(10),
                    tailslow: false,
                    max: percent(25),
                };
                control.set_throttling(Some(lower)).unwrap();
            }
            2 if last == Some(25) => control.set_throttling(None).unwrap(),
            3 if last == Some(0) => control.set_throttling(Some(ThrottlePolicy::dirty_limit())).unwrap(),
            4 if told.contains(&201) => control.set_throttling(None).unwrap(),
            5 if last == Some(200) => control.set_downtime_limit(AN_HOUR),
            _ => return,
        }
        step += 1;
    });
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}; {told:?}", sent.error);
    assert_eq!(told[..5], [20, 30, 40, 25, 0], "{told:?}");
    assert_eq!(
        told.iter().filter(|told| **told == 0).count(),
        3,
        "let go at each change, and at the end: {told:?}"
    );
}

#[test]
fn throttling_that_this_guest_can_not_be_given_is_refused_and_changes_nothing() {
    let (sent, told) = moved(0, |round, control, _| {
        if round == 2 {
            let error = control.set_throttling(Some(ThrottlePolicy::dirty_limit())).unwrap_err();
            assert!(error.to_string().contains("use auto-converge"), "{error}");
            assert_eq!(control.throttling(), None);
            control.set_downtime_limit(AN_HOUR);
        }
    });
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
    assert_eq!(told, [0], "the end lets it go, whatever it was");
}

#[test]
fn the_cache_of_sent_pages_grows_while_pages_travel() {
    let size = PAGES * 4096;
    let (sent, _) = moved(0, move |round, control, _| match round {
        3 => {
            assert_eq!(control.delta_cache(), Some(0));
            control.set_delta_cache(size).unwrap();
        }
        6 => control.set_downtime_limit(AN_HOUR),
        _ => {}
    });
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
    let deltas = sent.statistics.deltas;
    assert_eq!((deltas.cache_size, deltas.pages > 0), (size, true), "{deltas:?}");
    let ends = ends();
    let control = ends.source.control();
    let error = control.set_delta_cache(size).unwrap_err();
    assert_eq!((control.delta_cache(), error.kind()), (None, ErrorKind::Config), "{error}");
}

/// A switch by command, which a guest that never fits its downtime waits for for ever.
#[test]
fn postcopy_starts_when_it_is_asked_for() {
    if !crate::sys::testing::has_userfaultfd() {
        return;
    }
    let postcopy = PostcopySettings::new(PostcopyRule::OnCommand);
    let (sent, _) = moved_with(0, Some(postcopy), |round, control, _| {
        if round == 5 {
            control.start_postcopy().unwrap();
        }
    });
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
    assert_eq!(sent.statistics.round_count(), 5, "what is missing is in no round");
    let (sent, _) = moved(0, |_, control, _| {
        assert_eq!(control.start_postcopy().unwrap_err().kind(), ErrorKind::Config);
        control.set_downtime_limit(AN_HOUR);
    });
    assert_eq!((sent.outcome, sent.statistics.round_count()), (Outcome::Completed, 2), "{:?}", sent.error);
}

/// A handle gives the control of a source; a destination follows its source.
#[test]
fn a_handle_cancels_by_its_control() {
    let ends = super::ends_with(|settings| settings.pause_before_switchover = true);
    let destination = ends.destination.spawn().unwrap();
    let source = ends.source.spawn().unwrap();
    assert!(destination.control().is_none());
    assert_eq!(source.control().unwrap().cancel(), CancelReply::Accepted);
    assert!(source.wait().unwrap().guest_is_safe_here() && ends.source_machine.runs());
    assert_eq!(destination.wait().unwrap().ending, Ending::Discarded);
}
