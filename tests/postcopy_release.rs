//! A source whose memory is given back to its kernel while a stock QEMU runs the guest and takes the rest.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{
    Deadline,
    memory::{Pattern, compare, fill},
    qemu::{Guest, Machine, Qemu, Version, peers_present},
    scratch,
};
use ramwire::engine::{Ending, Outcome, PostcopyRule};
use ramwire::guest::{DeviceState, GuestControl, GuestMemory, MappedGuest};
use ramwire::session::{
    DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings, Error, Incoming,
    MemoryProvider, PostcopySettings, Redial, SourceConnection, SourceGuest, SourceSession, SourceSettings,
};
use ramwire::sys::{Mapping, Stop};
use ramwire::transport::{Address, AllowList, Listener, StreamOptions, connect};
use ramwire::units::{PageSize, Rate};
use serde_json::json;

const MACHINE: Machine = Machine::PcI440fx72;
const RAM_MIB: usize = 32;

/// A guest that came from a QEMU, and is paused in this process.
#[derive(Clone, Default)]
struct Held(Arc<Mutex<Parts>>);

#[derive(Default)]
struct Parts {
    memory: Option<Arc<MappedGuest>>,
    /// The mapping of the guest's RAM.
    ram: Option<Mapping>,
    state: Vec<u8>,
}

impl Held {
    fn memory(&self) -> Arc<MappedGuest> {
        Arc::clone(self.0.lock().unwrap().memory.as_ref().unwrap())
    }

    /// Bytes of its RAM that have memory.
    fn resident(&self) -> u64 {
        let parts = self.0.lock().unwrap();
        let (file, _) = parts.ram.as_ref().unwrap().backing().unwrap();
        u64::try_from(rustix::fs::fstat(file).unwrap().st_blocks).unwrap() * 512
    }
}

impl MemoryProvider for Held {
    fn provide(&mut self, incoming: &Incoming) -> Result<Arc<dyn GuestMemory>, Error> {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        let mut parts = self.0.lock().unwrap();
        for block in &incoming.blocks {
            let mapping = Mapping::memfd(block.name.as_str(), block.used_length).unwrap();
            builder = builder.mapping(block.clone(), &mapping);
            if block.name.as_str() == "m0" {
                parts.ram = Some(mapping);
            }
        }
        let memory = Arc::new(builder.build().unwrap());
        parts.memory = Some(Arc::clone(&memory));
        Ok(memory)
    }
}

impl GuestControl for Held {
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

impl DeviceState for Held {
    fn save(&mut self, out: &mut dyn Write) -> io::Result<()> {
        out.write_all(&self.0.lock().unwrap().state)
    }

    fn load(&mut self, from: &mut dyn Read) -> io::Result<()> {
        let mut parts = self.0.lock().unwrap();
        parts.state.clear();
        from.read_to_end(&mut parts.state).map(drop)
    }
}

/// Takes a guest from a QEMU, whole.
fn taken_from(source: &mut Qemu) -> (Held, Incoming) {
    let any: Address = "tcp:127.0.0.1:0".parse().unwrap();
    let mut listener = Listener::bind(&any, AllowList::default(), &Stop::never()).unwrap();
    let (uri, held) = (listener.address().to_string(), Held::default());
    let arriving = DestinationGuest { memory: Box::new(held.clone()), control: Box::new(held.clone()) };
    let session = std::thread::spawn(move || {
        let channel = listener.accept(&StreamOptions::default(), &Stop::never()).unwrap();
        let connection = DestinationConnection::over(channel);
        DestinationSession::new(arriving, connection, DestinationSettings::default()).run()
    });
    source.set_capabilities(&["return-path"]);
    source.set_parameters(json!({"max-bandwidth": 0}));
    source.migrate(&uri);
    let report = session.join().unwrap();
    assert_eq!(report.ending, Ending::Running, "{:?}", report.error);
    (held, report.incoming.unwrap())
}

/// A session that sends the guest to the QEMU at `uri`, slowly enough to be observed.
fn session(held: &Held, incoming: &Incoming, uri: &str, preempt: bool) -> SourceSession {
    let mut settings = SourceSettings::new(incoming.configuration.clone());
    settings.early_sections = incoming.early_sections.clone();
    settings.framing = incoming.seen.framing;
    settings.guest_is_paused = true;
    let mut postcopy = PostcopySettings::new(PostcopyRule::AfterRounds(0));
    postcopy.max_bandwidth = Some(Rate(8 << 20));
    postcopy.reconnect_timeout = std::time::Duration::from_secs(100);
    (postcopy.release_ram, postcopy.preempt) = (true, preempt);
    settings.postcopy = Some(postcopy);
    let (address, options): (Address, _) = (uri.parse().unwrap(), StreamOptions::default());
    let memory = held.memory() as Arc<dyn GuestMemory>;
    let channel = connect(&address, &options, &Stop::never()).unwrap();
    let guest =
        SourceGuest { memory: Arc::clone(&memory), dirty: Vec::new(), control: Box::new(held.clone()) };
    SourceSession::new(guest, SourceConnection::over(channel, memory), settings)
        .with_reconnect(Box::new(Redial::new(address, options)))
}

/// Breaks the connection, and has the QEMU listen again; calls `listens` then.
fn lose(qemu: &mut Qemu, uri: &str, listens: impl Fn()) {
    let deadline = Deadline::seconds(100);
    let mut is_lost = false;
    loop {
        let info = qemu.query_migrate();
        is_lost |= qemu.stderr().contains("Migration paused");
        match info["status"].as_str() {
            Some("postcopy-active") if is_lost => return,
            Some("postcopy-active") => drop(qemu.try_execute("migrate-pause", json!({}))),
            Some("postcopy-paused") if qemu.try_execute("migrate-recover", json!({"uri": uri})).is_ok() => {
                listens();
            }
            _ => {}
        }
        assert!(!deadline.is_over(), "{info}\n{}", qemu.stderr());
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

fn moves_to(version: Version, dir: &Path, preempt: bool) {
    let (sent, arrived) = (dir.join("sent"), dir.join("arrived"));
    fill(&sent, RAM_MIB, Pattern::Random { seed: 11 });
    fill(&arrived, RAM_MIB, Pattern::Random { seed: 3 });
    let mut source = Guest::new(Version::Qemu72, MACHINE, &sent, RAM_MIB).start(dir, "source");
    let (held, incoming) = taken_from(&mut source);
    source.kill();
    let mut destination =
        Guest::new(version, MACHINE, &arrived, RAM_MIB).incoming().start(dir, "destination");
    destination.set_capabilities(&["postcopy-ram"]);
    if preempt {
        destination.set_capabilities(&["postcopy-preempt"]);
    }
    let uri = destination.listen_tcp();
    let all = (RAM_MIB as u64) << 20;
    assert_eq!(held.resident(), all);
    let session = session(&held, &incoming, &uri, preempt);
    let control = session.control();
    let migration = session.spawn().unwrap();
    let goes = |below: u64, what: &str| {
        let state = || format!("{} bytes are left, {:?}", held.resident(), migration.progress().status);
        Deadline::seconds(100).poll(what, state, || (held.resident() < below).then_some(()));
    };
    goes(all - (2 << 20), "memory goes while pages follow");
    lose(&mut destination, &uri, || {
        // A source with a connection for urgent pages waits for this word.
        if preempt {
            control.recover(uri.parse().unwrap()).unwrap();
        }
    });
    goes(all / 2, "memory goes behind a lost connection");
    let report = migration.wait().unwrap();
    assert_eq!(report.outcome, Outcome::Completed, "{version}: {:?}", report.error);
    assert_eq!(held.resident(), 0, "{version}");
    assert!(report.released_pages >= all / 4096, "{version}: {}", report.released_pages);
    destination.wait_completed(Deadline::seconds(20));
    compare(&sent, &arrived).unwrap_or_else(|d| panic!("{version}: {d:?}"));
    destination.execute("cont", json!({}));
    assert_eq!(destination.status(), "running", "{version}");
}

/// A QEMU answers a mark after it has placed the pages before it: it never requests them again, not even after a
/// recovery.
#[test]
fn p22_memory_is_given_back_while_any_qemu_takes_the_rest_and_a_lost_connection_is_replaced() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        moves_to(version, scratch().path(), false);
    }
}

/// The same with a connection for urgent pages, of which only the last word, or a recovery, proves that they came.
#[test]
fn p4_p22_memory_is_given_back_beside_a_connection_for_urgent_pages() {
    if !peers_present() {
        return;
    }
    for version in Version::ALL {
        moves_to(version, scratch().path(), true);
    }
}
