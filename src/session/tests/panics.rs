//! Callbacks that panic: the guest continues, and the report contains the panic's message.
#![allow(clippy::unwrap_used)]

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use super::{Machine, ends};
use crate::engine::{Ending, Outcome};
use crate::guest::{DeviceState, DirtyError, DirtySource, GuestControl, GuestMemory, MappedGuest};
use crate::observe::EventKind;
use crate::ram::{PageBitmap, RamBlock};
use crate::session::*;
use crate::units::BlockIndex;

const TEXT: &str = "the embedder's own words";

/// Every callback of both ends; the named one panics.
#[derive(Clone)]
struct Embedder {
    panics: &'static str,
    machine: Machine,
    memory: Arc<MappedGuest>,
}

impl Embedder {
    fn call(&self, name: &str) {
        assert!(name != self.panics, "{TEXT}");
    }
}

impl GuestControl for Embedder {
    fn pause(&mut self) -> io::Result<()> {
        self.call("pause");
        self.machine.pause()
    }
    fn resume(&mut self) -> io::Result<()> {
        self.call("resume");
        self.machine.resume()
    }
    fn devices(&mut self) -> Option<&mut dyn DeviceState> {
        Some(self)
    }
}

impl DeviceState for Embedder {
    fn size(&mut self) -> u64 {
        self.call("size");
        0
    }
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        self.call("save");
        self.machine.save(out)
    }
    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        self.call("load");
        self.machine.load(from)
    }
}

impl DirtySource for Embedder {
    fn name(&self) -> &'static str {
        "test"
    }
    fn probe(&self) -> Result<(), DirtyError> {
        Ok(())
    }
    fn start(&self) -> Result<(), DirtyError> {
        self.call("start");
        Ok(())
    }
    fn begin_sync(&self) -> Result<(), DirtyError> {
        self.call("begin_sync");
        Ok(())
    }
    fn sync_into(&self, _: BlockIndex, _: &mut PageBitmap) -> Result<(), DirtyError> {
        self.call("sync_into");
        Ok(())
    }
    fn reprotect(&self, _: crate::ram::PageRun) -> Result<(), DirtyError> {
        self.call("reprotect");
        Ok(())
    }
    fn stop(&self) -> Result<(), DirtyError> {
        Ok(())
    }
}

impl MemoryProvider for Embedder {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        self.call("provide");
        self.memory.provide(incoming)
    }
    fn is_zeroed(&self, _: &RamBlock) -> bool {
        self.call("is_zeroed");
        false
    }
    fn arrived(&mut self, _: &Incoming, _: bool) {
        self.call("arrived");
    }
}

impl Upstream for Embedder {
    fn wait(&mut self, _: Duration) -> Result<News, Error> {
        self.call("wait");
        Ok(News::Stopped)
    }
    fn wait_for_ownership(&mut self, _: crate::engine::Handover, _: Duration) -> Result<bool, Error> {
        self.call("wait_for_ownership");
        Ok(true)
    }
}

/// Runs a migration in which one callback of an end panics.
fn migrate(at_source: Option<&'static str>, at_destination: Option<&'static str>) -> Moved {
    let mut ends = ends();
    let embedder = |panics: Option<_>, machine: &Machine, memory: &Arc<MappedGuest>| Embedder {
        panics: panics.unwrap_or_default(),
        machine: machine.clone(),
        memory: Arc::clone(memory),
    };
    let here = embedder(at_source, &ends.source_machine, &ends.from);
    let there = embedder(at_destination, &ends.destination_machine, &ends.to);
    ends.source.guest_mut().control = Box::new(here.clone());
    ends.source.guest_mut().dirty = vec![Arc::new(here.clone())];
    if let Some("wait" | "wait_for_ownership") = at_source {
        ends.source = ends.source.with_upstream(Box::new(here.clone()));
    }
    ends.source.statistics().listen(move |event| match event.kind {
        EventKind::Setup => here.call("listen: setup"),
        EventKind::Round(_) => here.call("listen: round"),
        EventKind::Switchover => here.call("listen: switchover"),
        EventKind::GivenAway => here.call("listen: given away"),
        EventKind::Completed => here.call("listen: completed"),
        EventKind::CleanedUp => here.call("listen: cleaned up"),
        _ => {}
    });
    ends.destination.arrive_in(Box::new(there.clone()));
    ends.destination.control_by(Box::new(there));
    let (source, destination) = (ends.source.spawn().unwrap(), ends.destination.spawn().unwrap());
    let events = source.events().clone();
    let (sent, arrived) = (source.wait().unwrap(), destination.wait().unwrap());
    let last = events.iter().map(|event| event.kind).filter(EventKind::is_last).count();
    assert_eq!(last, 1, "one event tells the end");
    let runs = (ends.source_machine.runs(), ends.destination_machine.runs());
    Moved { sent, arrived, runs }
}

struct Moved {
    sent: SourceReport,
    arrived: DestinationReport,
    /// Here, there.
    runs: (bool, bool),
}

/// The trait's function that a report of a panic names; listeners are functions without a name.
fn name_of(callback: &str) -> &str {
    if callback.starts_with("listen") { "a listener of events" } else { callback }
}

fn text(error: &Option<Error>) -> String {
    error.as_ref().map(ToString::to_string).unwrap_or_default()
}

#[test]
fn a_panic_of_the_source_before_commit_leaves_the_guest_running_there() {
    let callbacks = [
        "pause",
        "size",
        "save",
        "start",
        "begin_sync",
        "sync_into",
        "reprotect",
        "wait",
        "wait_for_ownership",
        "listen: setup",
        "listen: round",
        "listen: switchover",
    ];
    for callback in callbacks {
        let Moved { sent, arrived, runs } = migrate(Some(callback), None);
        assert!(sent.guest_is_safe_here(), "{callback}: {:?} {:?}", sent.outcome, sent.error);
        let said = text(&sent.error);
        assert!(said.contains(TEXT) && said.contains(name_of(callback)), "{callback}: {said}");
        assert_eq!((arrived.ending, runs), (Ending::Discarded, (true, false)), "{callback}");
        assert!(sent.dirty.count() >= 307, "{callback}: nothing counts as sent");
    }
}

#[test]
fn a_listener_that_panics_behind_commit_changes_nothing() {
    for callback in ["listen: given away", "listen: completed", "listen: cleaned up"] {
        let Moved { sent, arrived, runs } = migrate(Some(callback), None);
        assert_eq!((sent.outcome, arrived.ending), (Outcome::Completed, Ending::Running), "{callback}");
        assert_eq!(runs, (false, true), "{callback}");
    }
}

#[test]
fn a_panic_of_the_destination_before_commit_leaves_the_guest_at_the_source() {
    for callback in ["provide", "is_zeroed", "arrived", "load"] {
        let Moved { sent, arrived, runs } = migrate(None, Some(callback));
        let said = text(&arrived.error);
        assert!(said.contains(TEXT) && said.contains(name_of(callback)), "{callback}: {said}");
        assert_eq!((arrived.ending, runs), (Ending::Discarded, (true, false)), "{callback}");
        assert!(sent.guest_is_safe_here(), "{callback}: {:?}", sent.outcome);
        // An end that still sends pages may find the closed connection first.
        let told = text(&sent.error).contains(TEXT);
        assert!(told || !callback.starts_with("load"), "{callback}: the source is told: {:?}", sent.error);
    }
}

#[test]
fn a_start_that_panics_leaves_the_guest_in_doubt() {
    let Moved { sent, arrived, runs } = migrate(None, Some("resume"));
    assert_eq!((sent.outcome, arrived.ending), (Outcome::InDoubt, Ending::Stranded));
    assert_eq!(runs, (false, false));
    assert!(text(&arrived.error).contains(TEXT) && text(&sent.error).contains(TEXT));
}
