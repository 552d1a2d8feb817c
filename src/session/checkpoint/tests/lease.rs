//! A standby that starts by itself, and a source that stands still before that.

use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::*;

/// So long that a busy machine renews it in time.
const TIME: Duration = Duration::from_secs(3);
const CONFIG: LeaseConfig = LeaseConfig { time: TIME, stop: Duration::from_millis(500) };

/// What runs at the source: its vCPUs look at the lease.
fn runs_at_source(vm: &Vm, lease: &Lease) -> bool {
    vm.machine.runs() && lease.holds()
}

/// Waits for the guest to start at the standby: until then it may run at the source, and behind that it does not.
fn starts_alone(protected: &Protected, lease: &Lease) {
    while !protected.machine.runs() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!runs_at_source(&protected.vm, lease), "both run");
}

/// Passes bytes on until `hole` is raised, and drops them then; the connection stays open.
fn pass_on(from: &UnixStream, to: &UnixStream, hole: &Arc<AtomicBool>) -> JoinHandle<()> {
    let (mut from, mut to, hole) = (from.try_clone().unwrap(), to.try_clone().unwrap(), Arc::clone(hole));
    std::thread::spawn(move || {
        let mut buffer = [0; 16384];
        while let Ok(got @ 1..) = from.read(&mut buffer) {
            if !hole.load(Ordering::Relaxed) && to.write_all(&buffer[..got]).is_err() {
                break;
            }
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    })
}

#[test]
fn a_standby_starts_by_itself_when_nothing_comes_any_more() {
    let lease = Lease::default();
    let (near, there) = UnixStream::pair().unwrap();
    let (here, far) = UnixStream::pair().unwrap();
    let hole = Arc::default();
    let passing = [pass_on(&there, &here, &hole), pass_on(&here, &there, &hole)];
    let protected = protected_over(near, far, Some(CONFIG), &lease);
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    assert!(lease.left().is_some_and(|left| left <= TIME) && runs_at_source(&protected.vm, &lease));
    for _ in 0..3 {
        let before = lease.left();
        while lease.left() <= before {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    assert!(runs_at_source(&protected.vm, &lease) && !protected.machine.runs());
    protected.checkpoint(2);
    hole.store(true, Ordering::Relaxed);
    starts_alone(&protected, &lease);
    let Protected { source, standby, vm, near, kept, there: arrived, .. } = protected;
    let report = standby.wait().unwrap();
    assert_eq!((report.ending, report.last, report.by_lease), (StandbyEnding::Active(2), 2, true));
    assert!(bytes(&arrived) == *kept.lock().unwrap()[1]);
    near.shutdown(Shutdown::Both).unwrap();
    let report = source.wait().unwrap();
    assert_eq!(
        (report.outcome, report.not_resumed),
        (CheckpointOutcome::Fenced, false),
        "{:?}",
        report.error
    );
    assert!(!vm.machine.runs() && !lease.holds() && report.fences > 0, "{report:?}");
    drop((here, there));
    passing.into_iter().for_each(|thread| thread.join().unwrap());
}

/// The source can't know whether its standby is dead: the guest is whole, and runs again when somebody knows.
#[test]
fn a_source_that_loses_its_standby_stands_still_until_somebody_knows() {
    let lease = Lease::default();
    let (near, far) = UnixStream::pair().unwrap();
    let protected = protected_over(near, far, Some(CONFIG), &lease);
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    protected.near.shutdown(Shutdown::Both).unwrap();
    starts_alone(&protected, &lease);
    let Protected { source, standby, vm, .. } = protected;
    let report = source.wait().unwrap();
    assert_eq!(report.outcome, CheckpointOutcome::Fenced, "{:?}", report.error);
    assert!(!vm.machine.runs() && lease.left() == Some(Duration::ZERO));
    assert_eq!(standby.wait().unwrap().ending, StandbyEnding::Active(1));
    lease.overrule();
    assert!(lease.holds() && lease.left().is_none());
}

#[test]
fn a_standby_that_gives_the_guest_up_lets_it_run_at_its_source() {
    let lease = Lease::default();
    let (near, far) = UnixStream::pair().unwrap();
    let protected = protected_over(near, far, Some(CONFIG), &lease);
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    protected.standby.discard();
    let report = protected.source.wait().unwrap();
    assert_eq!(report.outcome, CheckpointOutcome::Unprotected, "{:?}", report.error);
    let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
    assert!(text.contains("given the guest up"), "{text}");
    assert!(protected.vm.machine.runs() && lease.left().is_none());
    assert_eq!(protected.standby.wait().unwrap().ending, StandbyEnding::Discarded);
}

#[test]
fn a_protection_that_is_ended_needs_no_lease_any_more() {
    let lease = Lease::default();
    let (near, far) = UnixStream::pair().unwrap();
    let protected = protected_over(near, far, Some(CONFIG), &lease);
    protected.hears("taken", 1);
    protected.hears("safe", 1);
    protected.source.stop();
    let report = protected.source.wait().unwrap();
    assert_eq!(report.outcome, CheckpointOutcome::Stopped, "{:?}", report.error);
    assert!(report.error.is_none() && protected.vm.machine.runs() && lease.left().is_none());
    assert_eq!(protected.standby.wait().unwrap().ending, StandbyEnding::Released);
}

/// What a standby could have got of it makes no difference.
#[test]
fn before_the_first_checkpoint_a_source_needs_no_lease() {
    let lease = Lease::default();
    let (near, far) = UnixStream::pair().unwrap();
    far.shutdown(Shutdown::Both).unwrap();
    let protected = protected_over(near, far, Some(CONFIG), &lease);
    let report = protected.source.wait().unwrap();
    assert_eq!(report.outcome, CheckpointOutcome::Unprotected, "{:?}", report.error);
    assert!(protected.vm.machine.runs() && lease.left().is_none());
    assert_eq!(protected.standby.wait().unwrap().ending, StandbyEnding::Discarded);
}

/// A standby that grants what nobody has asked for is none.
#[test]
fn a_lease_that_was_not_asked_for_counts_for_nothing() {
    let vm = Vm::new();
    let (near, far) = UnixStream::pair().unwrap();
    let (tell, _told) = mpsc::channel();
    let watch = Watch { tell, memory: vm.memory.clone(), kept: Arc::default() };
    let settings = CheckpointSettings { lease: Some(CONFIG), ..CheckpointSettings::default() };
    let source = CheckpointSession::new(vm.guest(), channel(near), Box::new(watch), settings).unwrap();
    (&far).write_all(&StandbyMessage::Ready.encode()).unwrap();
    (&far).write_all(&StandbyMessage::Grant(7).encode()).unwrap();
    let report = source.spawn().unwrap().wait().unwrap();
    let text = report.error.map(|error| Chain(&error).to_string()).unwrap_or_default();
    assert!(text.contains("lease 7, which was not asked for"), "{text}");
}

#[test]
fn a_lease_of_which_nothing_is_left_for_the_guest_is_refused() {
    for (time, stop) in [(0, 0), (100, 51), (100, 100)] {
        let [time, stop] = [time, stop].map(Duration::from_millis);
        let (near, _far) = UnixStream::pair().unwrap();
        let (tell, _told) = mpsc::channel();
        let watch = Watch { tell, memory: memory(1), kept: Arc::default() };
        let lease = Some(LeaseConfig { time, stop });
        let settings = CheckpointSettings { lease, ..CheckpointSettings::default() };
        let refused = CheckpointSession::new(Vm::new().guest(), channel(near), Box::new(watch), settings);
        assert!(matches!(refused, Err(Error::Config { .. })), "{time:?} {stop:?}");
    }
}
