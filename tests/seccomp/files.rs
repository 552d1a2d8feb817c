//! Saving to a file and loading from it.

use std::collections::HashMap;

use ramwire::engine::{Ending, Outcome};
use ramwire::guest::TestMachine;
use ramwire::session::{
    DestinationGuest, DestinationSession, DestinationSettings, RestoreSession, RestoreSettings, RestoreWay,
    SourceGuest, SourceSession, SourceSettings,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::{Address, AllowList, ConnectionOptions, Listener, open_source};
use seccompiler::BpfProgram;

use super::PAGES;
use super::machine::{Machine, spawner};

/// A paused guest is saved to a `mapped:` file and loaded from it. The sessions run on this thread, without a filter;
/// the threads that write and read pages run under their filters.
pub(crate) fn through_a_file(filters: Option<HashMap<String, BpfProgram>>) {
    let (here, there) = (Machine::new(), Machine::new());
    (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| here.write(page, page + 1));
    let spawner = spawner(filters);
    let stop = Stop::on(&CancelToken::default());
    let folder = tempfile::tempdir().unwrap();
    let address: Address = format!("mapped:{}", folder.path().join("guest").display()).parse().unwrap();
    let mut options = ConnectionOptions::default();
    options.channels.count = 2;
    options.channels.spawn = spawner.callback();
    let mut settings = SourceSettings::new(Configuration::default());
    settings.guest_is_paused = true;
    settings.spawner = spawner.clone();
    let guest = SourceGuest {
        memory: here.memory.clone(),
        dirty: Vec::new(),
        control: Box::new(TestMachine::default()),
    };
    let link = open_source(&address, here.memory.clone(), &options, &stop).unwrap();
    let left = SourceSession::new(guest, link, settings).run();
    assert_eq!(left.outcome, Outcome::Completed, "{:?}", left.error);
    let mut arrives = DestinationSettings::default();
    arrives.spawner = spawner;
    let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
    let connection = listener.accept_connection(&options, &stop).unwrap();
    let guest = DestinationGuest {
        memory: Box::new(there.memory.clone()),
        control: Box::new(TestMachine::default()),
    };
    let arrived = DestinationSession::new(guest, connection, arrives).run();
    assert_eq!(arrived.ending, Ending::Running, "{:?}", arrived.error);
    assert!(here.bytes() == there.bytes());
    println!("migrated");
}

/// Starts a guest from a file before its memory is read, twice: without and with a working set.
pub(crate) fn restore(filters: Option<HashMap<String, BpfProgram>>) {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let (path, set) = (folder.path().join("guest"), folder.path().join("working-set"));
    let address: Address = format!("mapped:{}", path.display()).parse().unwrap();
    let from = Machine::new();
    (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| from.write(page, page));
    let connection =
        open_source(&address, from.memory.clone(), &ConnectionOptions::default(), &Stop::never()).unwrap();
    let control = Box::new(TestMachine::default());
    let guest = SourceGuest { memory: from.memory.clone(), dirty: Vec::new(), control };
    let mut settings = SourceSettings::new(Configuration::default());
    settings.guest_is_paused = true;
    assert_eq!(SourceSession::new(guest, connection, settings).run().outcome, Outcome::Completed);
    let spawner = spawner(filters);
    for _ in 0..2 {
        let mut settings = RestoreSettings::default();
        settings.way = RestoreWay::Lazy;
        (settings.user_mode_only, settings.working_set) = (true, Some(set.clone()));
        settings.destination.spawner = spawner.clone();
        let to = Machine::new();
        let control = Box::new(TestMachine::default());
        let guest = DestinationGuest { memory: Box::new(to.memory.clone()), control };
        let restored = RestoreSession::open(guest, &address, settings).unwrap().run().unwrap();
        assert_eq!(restored.report.ending, Ending::Running, "{:?}", restored.report.error);
        assert!(from.bytes() == to.bytes());
        restored.pages.unwrap().wait().unwrap();
    }
    println!("migrated");
}
