//! Snapshots of a running guest, into files and into a stream; and memory that pagers read from its server.

use std::collections::HashMap;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc;

use ramwire::session::{
    SnapshotGuest, SnapshotOutcome, SnapshotReport, SnapshotSession, SnapshotSettings, SourceConnection,
};
use ramwire::stream::qemu::file::Configuration;
use ramwire::sys::Stop;
use ramwire::transport::{
    Address, AllowList, ConnectionOptions, Listener, PageServer, RemoteMemory, StoredMemory, StreamChannel,
    StreamOptions, open_source,
};
use seccompiler::BpfProgram;

use super::PAGES;
use super::machine::{Machine, spawner};

/// The guest writes while snapshots of it are taken: a whole one, one of what has changed since, one into a socket, and one
/// that is cancelled.
pub(crate) fn snapshots(filters: Option<HashMap<String, BpfProgram>>) {
    let machine = Machine::new();
    let writer = machine.start();
    let spawner = spawner(filters);
    let folder = tempfile::tempdir().unwrap();
    let session = || {
        machine.allow(PAGES);
        let control = Box::new(machine.clone());
        let guest = SnapshotGuest { memory: machine.memory.clone(), control, other_writers: Vec::new() };
        let mut settings = SnapshotSettings::new(Configuration::default());
        settings.user_mode_only = true;
        // The buffer is small, so that writers and pages wait for room.
        settings.buffer = 1 << 20;
        settings.spawner = spawner.clone();
        SnapshotSession::new(guest, settings).unwrap()
    };
    let into_file = |session: SnapshotSession, name: &str| -> SnapshotReport {
        let path = folder.path().join(name);
        let address: Address = format!("mapped:{}", path.display()).parse().unwrap();
        let mut options = ConnectionOptions::default();
        options.channels.spawn = spawner.callback();
        let connection = open_source(&address, session.memory(), &options, &Stop::never()).unwrap();
        session.spawn(connection).unwrap().wait().unwrap()
    };
    let taken = |report: &SnapshotReport| {
        assert_eq!(report.outcome, SnapshotOutcome::Taken, "{:?}", report.error);
    };
    let whole = into_file(session().tracked(vec![machine.written.clone()]), "whole");
    taken(&whole);
    let since = into_file(session().since(whole.base.unwrap()).unwrap(), "since");
    taken(&since);
    drop(since);

    let (near, far) = UnixStream::pair().unwrap();
    let sent = session();
    let near = StreamChannel::from_fd(near.into(), "peer", &StreamOptions::default()).unwrap();
    let connection = SourceConnection::over(near, sent.memory());
    let handle = sent.spawn(connection).unwrap();
    let reader = std::thread::spawn(move || std::io::copy(&mut &far, &mut std::io::sink()).unwrap());
    taken(&handle.wait().unwrap());
    assert!(reader.join().unwrap() > PAGES);

    // Nobody reads: it waits until it is cancelled.
    let (near, far) = UnixStream::pair().unwrap();
    let stuck = session();
    let near = StreamChannel::from_fd(near.into(), "peer", &StreamOptions::default()).unwrap();
    let connection = SourceConnection::over(near, stuck.memory());
    let handle = stuck.spawn(connection).unwrap();
    super::machine::rest(super::SLOW);
    let _ = handle.cancel();
    assert_eq!(handle.wait().unwrap().outcome, SnapshotOutcome::Cancelled);
    drop(far);
    machine.ended.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    println!("migrated");
}

/// A server's thread, which serves a connection, and the one that takes its answers.
pub(crate) fn served(way: &str, filters: Option<HashMap<String, BpfProgram>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("memory");
    let machine = Machine::new();
    (0..PAGES).filter(|page| page % 5 > 0).for_each(|page| machine.write(page, page));
    let bytes = machine.bytes();
    std::fs::write(&path, &bytes).unwrap();
    let spawner = spawner(filters);
    let socket = folder.path().join("socket");
    let address: Address = match way {
        "tcp" => "tcp:127.0.0.1:0".parse().unwrap(),
        _ => Address::unix(&socket),
    };
    let mut listener = Listener::bind(&address, AllowList::default(), &Stop::never()).unwrap();
    let address = listener.address().clone();
    let server = PageServer::new(Arc::new(StoredMemory::plain(&path).unwrap()));
    let (told, ended) = mpsc::channel();
    let by = spawner.clone();
    let accepting = std::thread::spawn(move || {
        let channel = listener.accept(&StreamOptions::default(), &Stop::never()).unwrap();
        let job =
            move || told.send(server.serve(channel, &Stop::never()).map(|served| served.reads)).unwrap();
        by.spawn("ramwire-serve", Box::new(job)).unwrap().join().unwrap();
    });
    let remote = StoredMemory::remote(RemoteMemory::connect(&address, spawner.callback()).unwrap());
    assert_eq!(remote.len(), bytes.len() as u64);
    let mut found = vec![0; bytes.len()];
    for (at, part) in found.chunks_mut(1 << 20).enumerate() {
        remote.read_at((at as u64) << 20, part).unwrap();
    }
    assert!(found == bytes);
    drop(remote);
    accepting.join().unwrap();
    assert!(ended.recv().unwrap().unwrap() > 0);
    println!("migrated");
}
