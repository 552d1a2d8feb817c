//! Events and commands of an embedder during a migration: events in their order, the gate before the switchover, memory
//! that changes.
#![allow(clippy::unwrap_used)]

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Machine, ends, ends_with};
use crate::engine::{Ending, Outcome};
use crate::guest::{DeviceState, GuestControl, LayoutChange, MappedGuest};
use crate::observe::{EventKind, SharedStatistics, Status};
use crate::ram::{BlockName, RamBlock};
use crate::session::source::skip_tests::moved;
use crate::session::*;
use crate::stream::qemu::file::Configuration;
use crate::sys::Mapping;
use crate::units::{BlockIndex, PageSize, Rate};

type Heard = Arc<Mutex<Vec<(EventKind, String)>>>;

/// Records the events, and on which thread they were called.
fn listening(statistics: &SharedStatistics) -> Heard {
    let heard = Heard::default();
    let list = Arc::clone(&heard);
    statistics.listen(move |event| {
        let thread = std::thread::current().name().unwrap_or("?").to_owned();
        list.lock().unwrap().push((event.kind.clone(), thread));
    });
    heard
}

/// The names of the recorded events in one line; all must be on `thread`.
fn order(heard: &Heard, thread: &str) -> String {
    let heard = heard.lock().unwrap();
    assert!(heard.iter().all(|(_, on)| on == thread), "{heard:?}");
    let name = |kind: &EventKind| match kind {
        EventKind::SyncBegins { last: true } => "LastSyncBegins".to_owned(),
        EventKind::Synced { last: true, .. } => "LastSynced".to_owned(),
        kind => format!("{kind:?}").split([' ', '(']).next().unwrap_or_default().to_owned(),
    };
    heard.iter().map(|(kind, _)| name(kind)).collect::<Vec<_>>().join(" ")
}

#[test]
fn listeners_hear_setup_syncs_and_cleanup_in_order_on_the_migrations_thread() {
    let ends = ends();
    let heard = [listening(&ends.source.statistics()), listening(&ends.destination.statistics())];
    let destination = ends.destination.spawn().unwrap();
    let sent = ends.source.spawn().unwrap().wait().unwrap();
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.error);
    destination.wait().unwrap();
    assert_eq!(
        order(&heard[0], "ramwire-source"),
        "Setup Active SyncBegins Synced Round SyncBegins Synced Switchover LastSyncBegins LastSynced Round \
         GivenAway Completed CleanedUp"
    );
    assert_eq!(order(&heard[1], "ramwire-dest"), "Setup Active Completed CleanedUp");
}

#[test]
fn a_failure_and_a_cancel_are_told_and_then_the_cleanup() {
    for cancels in [true, false] {
        let ends = ends();
        let heard = [listening(&ends.source.statistics()), listening(&ends.destination.statistics())];
        let (cancel, memory) = (ends.source.cancel_token(), Arc::clone(&ends.from));
        ends.source.statistics().listen(move |event| {
            if matches!(event.kind, EventKind::Round(_)) {
                if cancels {
                    cancel.cancel();
                } else {
                    memory.layout_changed(LayoutChange::Added { block: BlockName::new("dimm1").unwrap() });
                }
            }
        });
        let destination = ends.destination.spawn().unwrap();
        let sent = ends.source.spawn().unwrap().wait().unwrap();
        assert!(sent.guest_is_safe_here() && ends.source_machine.runs());
        assert_eq!(destination.wait().unwrap().ending, Ending::Discarded);
        let end = if cancels { "Cancelled" } else { "Failed" };
        let told = order(&heard[0], "ramwire-source");
        assert_eq!(told, format!("Setup Active SyncBegins Synced Round {end} CleanedUp"));
        assert_eq!(order(&heard[1], "ramwire-dest"), "Setup Active Failed CleanedUp");
    }
}

#[test]
fn memory_that_changes_ends_the_migration() {
    let resized = |block, length| LayoutChange::Resized { block: BlockName::new(block).unwrap(), length };
    for when in ["Synced", "Switchover"] {
        let ends = ends();
        let memory = Arc::clone(&ends.from);
        ends.source.statistics().listen(move |event| {
            if format!("{:?}", event.kind).starts_with(when) {
                memory.layout_changed(resized("block1", 16 * 4096));
            }
        });
        let destination = ends.destination.spawn().unwrap();
        let sent = ends.source.run();
        assert!(sent.guest_is_safe_here() && ends.source_machine.runs(), "{when}");
        assert_eq!(destination.wait().unwrap().ending, Ending::Discarded);
        let error = sent.error.unwrap();
        assert!(error.is_recoverable() && error.kind() == ErrorKind::Local);
        assert_eq!(
            error.to_string(),
            "RAM block block1 was resized to 65536 bytes in the middle of the migration; the guest runs on here; start \
             the migration again"
        );
    }
}

/// Memory that grows while it migrates arrives at its new size, by the next migration.
#[test]
fn a_guest_whose_block_has_grown_moves_as_it_is_then() {
    const MAX_LEN: u64 = 16 * 4096;
    let [near, far] = [0, 1].map(|_| Mapping::anonymous(MAX_LEN).unwrap());
    let of_length = |mapping: &Mapping, used_length| {
        let mut block = RamBlock::new(BlockName::new("ram").unwrap(), used_length);
        block.max_length = MAX_LEN;
        Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, mapping).build().unwrap())
    };
    near.region().span(0, MAX_LEN).unwrap().copy_from(&[5; MAX_LEN as usize]);
    for (length, grows) in [(7 * 4096, true), (MAX_LEN, false)] {
        let (from, to) = (of_length(&near, length), of_length(&far, length));
        let memory = Arc::clone(&from);
        let machine = Machine::running(b"");
        let control = Box::new(machine.clone());
        let (sent, arrived, ()) = moved((&from, &to), Vec::new(), control, 0, |source| {
            source.statistics().listen(move |event| {
                if grows && matches!(event.kind, EventKind::Round(_)) {
                    let block = BlockName::new("ram").unwrap();
                    memory.layout_changed(LayoutChange::Resized { block, length: MAX_LEN });
                }
            });
            (source, ())
        });
        assert_eq!((sent.guest_is_safe_here(), machine.runs()), (grows, grows), "{:?}", sent.error);
        assert_eq!(arrived.ending == Ending::Running, !grows, "{:?}", arrived.error);
    }
    let mut there = vec![0; MAX_LEN as usize];
    far.region().span(0, MAX_LEN).unwrap().copy_to(&mut there);
    assert!(there.iter().all(|byte| *byte == 5));
}

/// The paused guest waits for its embedder: to continue, or to be resumed.
#[test]
fn a_switchover_waits_for_its_gate() {
    for cancels in [false, true] {
        let ends = ends_with(|settings| settings.pause_before_switchover = true);
        let control = ends.source.control();
        let destination = ends.destination.spawn().unwrap();
        let source = ends.source.spawn().unwrap();
        let began = Instant::now();
        while source.progress().status != Status::PreSwitchover {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", source.progress());
            std::thread::sleep(Duration::from_millis(2));
        }
        // Longer than the interval at which cancel and peer are checked.
        std::thread::sleep(Duration::from_millis(120));
        let held = source.progress();
        assert_eq!(held.status, Status::PreSwitchover, "it waits");
        assert!(!ends.source_machine.runs() && !ends.destination_machine.runs());
        assert!(!held.rounds.iter().any(|round| round.paused), "its last pages wait too");
        if cancels {
            assert_eq!(source.cancel(), CancelReply::Accepted);
        } else {
            control.continue_switchover();
        }
        let sent = source.wait().unwrap();
        destination.wait().unwrap();
        assert_eq!(sent.guest_is_safe_here(), cancels, "{:?}", sent.error);
        assert_eq!((ends.source_machine.runs(), ends.destination_machine.runs()), (cancels, !cancels));
        let parts = sent.statistics.downtime_parts;
        assert!(parts.hold_ms >= 100.0 && sent.statistics.downtime >= parts.hold_ms, "{parts:?}");
    }
}

/// A VM with more device state than any link sends in a moment.
struct Heavy(Machine);

impl GuestControl for Heavy {
    fn pause(&mut self) -> io::Result<()> {
        self.0.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        self.0.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Heavy {
    fn size(&mut self) -> u64 {
        1 << 44
    }
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.0.save(out)
    }
}

/// No page is dirty after the first round: a further round would send nothing, whatever the limit is.
#[test]
fn device_state_that_takes_longer_than_the_limit_makes_no_empty_rounds() {
    for downtime in [0, 1, 300] {
        let mut ends = ends_with(|settings| {
            settings.downtime_limit = Duration::from_millis(downtime);
            settings.max_bandwidth = Rate::limit(20 << 20);
        });
        ends.source.guest_mut().control = Box::new(Heavy(ends.source_machine.clone()));
        let destination = ends.destination.spawn().unwrap();
        let sent = ends.source.run();
        assert_eq!((sent.outcome, destination.wait().unwrap().ending), (Outcome::Completed, Ending::Running));
        assert_eq!(sent.statistics.rounds.len(), 2, "{downtime} ms: the live one and the last");
    }
}

/// Page channels and compression: 8 MiB of pages that become a few KiB, and a device state that claims 16 TiB.
#[test]
fn pages_that_compress_on_channels_make_no_empty_rounds() {
    use crate::sys::{CancelToken, Stop};
    use crate::transport::{AllowList, ChannelOptions, ConnectionOptions, Listener, open_source};
    let (from, to) = (super::tests::guest(&[2048]), super::tests::guest(&[2048]));
    let ram = from.region(BlockIndex(0)).unwrap().span(0, 2048 * 4096).unwrap();
    ram.copy_from(&vec![7; 2048 * 4096]);
    let stop = Stop::on(&CancelToken::default());
    let compression = "zstd".parse().unwrap();
    let channels = ChannelOptions { count: 4, compression, ..ChannelOptions::default() };
    let options = ConnectionOptions { channels, ..ConnectionOptions::default() };
    let at = "tcp:127.0.0.1:0".parse().unwrap();
    let mut listener = Listener::bind(&at, AllowList::default(), &stop).unwrap();
    let connection = open_source(listener.address(), from.clone(), &options, &stop).unwrap();
    let machine = Machine::running(b"devices");
    let guest = SourceGuest { memory: from.clone(), dirty: Vec::new(), control: Box::new(Heavy(machine)) };
    let mut settings = SourceSettings::new(Configuration { machine: "none".into(), ..Default::default() });
    settings.guest_is_paused = true;
    settings.downtime_limit = Duration::from_millis(50);
    let source = SourceSession::new(guest, connection, settings).spawn().unwrap();
    let connection = listener.accept_connection(&options, &stop).unwrap();
    let settings = DestinationSettings::default();
    let machine = Box::new(Machine::default());
    let arrived = DestinationSession::new(
        DestinationGuest { memory: Box::new(to.clone()), control: machine },
        connection,
        settings,
    )
    .run();
    let sent = source.wait().unwrap();
    assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{:?}", sent.error);
    assert!(sent.statistics.transferred < 1 << 20, "they compress: {}", sent.statistics.transferred);
    assert_eq!(sent.statistics.rounds.len(), 2, "the live one and the last");
}

#[test]
fn device_state_counts_in_the_estimate_of_the_downtime() {
    let mut ends = ends_with(|settings| settings.downtime_limit = Duration::from_secs(1 << 40));
    ends.source.guest_mut().control = Box::new(Heavy(ends.source_machine.clone()));
    let destination = ends.destination.spawn().unwrap();
    let sent = ends.source.run();
    assert_eq!((sent.outcome, destination.wait().unwrap().ending), (Outcome::Completed, Ending::Running));
    let expected: Vec<f64> =
        sent.statistics.rounds.iter().filter_map(|round| round.expected_downtime_ms).collect();
    // 16 TiB at less than 1 TB/s.
    assert!(expected.last().is_some_and(|ms| *ms > 16e3), "{expected:?}");
}
