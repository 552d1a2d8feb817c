//! The embedder's memory panics on the thread of a page channel: both ends end, and the report names the callback.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ramwire::engine::{Ending, Outcome, Reason};
use ramwire::guest::{GuestError, GuestMemory, MappedGuest, TestMachine};
use ramwire::ram::{Landing, RamBlockTable};
use ramwire::session::{
    DestinationGuest, DestinationSession, DestinationSettings, Error, Incoming, MemoryProvider, SourceGuest,
    SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{HostSpan, Mapping};
use ramwire::transport::open_source;

use crate::counts::{PAGES, bind, filled, guest, options, stop};

const TEXT: &str = "the embedder's own words";

/// Memory that panics once on the thread of a page channel.
struct Panics {
    inner: Arc<MappedGuest>,
    armed: AtomicBool,
}

impl Panics {
    fn new(mapping: &Mapping, armed: bool) -> Arc<Self> {
        Arc::new(Self { inner: guest(mapping), armed: armed.into() })
    }
}

impl GuestMemory for Panics {
    fn table(&self) -> &RamBlockTable {
        self.inner.table()
    }

    fn span(&self, landing: Landing) -> Result<HostSpan<'_>, GuestError> {
        let on_channel = std::thread::current().name().is_some_and(|name| name.starts_with("ramwire-chan"));
        assert!(!(on_channel && self.armed.swap(false, Ordering::Relaxed)), "{TEXT}");
        self.inner.span(landing)
    }

    fn discard(&self, landing: Landing) -> Result<(), GuestError> {
        self.inner.discard(landing)
    }
}

struct Provides(Arc<Panics>);

impl MemoryProvider for Provides {
    fn provide(&mut self, _: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        Ok(self.0.clone())
    }
}

fn said(error: Option<&Error>) -> String {
    error.map(|error| ramwire::error::Chain(error).to_string()).unwrap_or_default()
}

/// The error of each end, for a migration in which the memory of one of them panics.
fn migrate(at_source: bool) -> (String, String) {
    let (from, to) = (filled(), Mapping::anonymous(PAGES * 4096).unwrap());
    let (here, there) = (TestMachine::running(b"devices"), TestMachine::default());
    let mut listener = bind();
    let (near, far) = (Panics::new(&from, at_source), Panics::new(&to, !at_source));
    let connection = open_source(listener.address(), near.clone(), &options(2), &stop()).unwrap();
    let source = SourceGuest { memory: near, dirty: Vec::new(), control: Box::new(here.clone()) };
    let mut settings =
        SourceSettings::new(Configuration { machine: "none".into(), ..Configuration::default() });
    settings.guest_is_paused = true;
    let source = SourceSession::new(source, connection, settings).spawn().unwrap();
    let connection = listener.accept_connection(&options(2), &stop()).unwrap();
    let guest = DestinationGuest { memory: Box::new(Provides(far)), control: Box::new(there.clone()) };
    let arrived = DestinationSession::new(guest, connection, DestinationSettings::default()).run();
    let sent = source.wait().unwrap();
    let (near, far) = (said(sent.error.as_ref()), said(arrived.error.as_ref()));
    assert_eq!(sent.outcome, Outcome::StaysHere(Reason::Failed), "{near}; {far}");
    assert_eq!(
        (arrived.ending, here.runs(), there.runs()),
        (Ending::Discarded, true, false),
        "{near}; {far}"
    );
    assert_eq!(sent.dirty.count(), PAGES, "what was under way counts as unsent: {near}");
    (near, far)
}

#[test]
fn memory_that_panics_on_a_channels_thread_is_named_and_the_guest_stays() {
    let name = "calling GuestMemory::span";
    let (near, _) = migrate(true);
    assert!(near.contains(name) && near.contains(TEXT), "{near}");
    let (near, far) = migrate(false);
    assert!(far.contains(name) && far.contains(TEXT), "{far}; {near}");
}
