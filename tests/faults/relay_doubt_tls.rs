//! A relay with TLS whose process is killed in doubt: the process that holds the source's connection has no keys, so it reads
//! no answer and can tell the source nothing.

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use ramwire::sys::{RecvPart, SendPart, Stop};
use ramwire::transport::{
    Address, AllowList, ByteSink as _, ByteSource as _, Listener, StreamChannel, StreamOptions, Tls,
    TlsOptions, connect,
};
use rustix::process::Signal;

use crate::common::{Deadline, certificates::Authority, scratch};
use crate::relay_doubt::{Output, Relayed, setup, shut};

/// A socket whose bytes travel on `channel`. The end of either is the other's.
fn carried_by(channel: StreamChannel) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (breaker, (mut sink, mut source)) = (channel.breaker(), channel.split());
    let (mut from, mut to) = (theirs.try_clone().unwrap(), theirs);
    thread::spawn(move || {
        let mut room = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut room) {
            if sink.send(&[SendPart::Own(&room[..count])], &Stop::never()).is_err() {
                break;
            }
        }
        breaker.close();
    });
    thread::spawn(move || {
        let mut room = [0; 4096];
        while let Ok(count @ 1..) = source.recv(&mut [RecvPart::Own(&mut room)], &Stop::never()) {
            if to.write_all(&room[..count]).is_err() {
                break;
            }
        }
        // It may be gone as well.
        let _ = to.shutdown(Shutdown::Write);
    });
    ours
}

/// A killed relay, of which one side is encrypted: the far end has received everything, and has sent nothing.
fn killed(dir: &Path, near_is_encrypted: bool) -> Relayed {
    let certificates = Authority::new("the authority").folder(dir.join("certificates"));
    let tls = TlsOptions::in_dir(&certificates);
    let mut named = tls.clone();
    named.hostname = Some("localhost".into());
    let (source, destination) = (Tls::of_source(&named).unwrap(), Tls::of_destination(&tls).unwrap());
    let (options, stop) = (StreamOptions::default(), Stop::never());
    let connects = |near: &Path| {
        if !near_is_encrypted {
            return UnixStream::connect(near).ok();
        }
        connect(&Address::unix(near).with_tls(source.clone()), &options, &stop).ok().map(carried_by)
    };
    let listens = |far: &Path| {
        let address = Address::unix(far);
        let address = if near_is_encrypted { address } else { address.with_tls(destination.clone()) };
        let mut listener = Listener::bind(&address, AllowList::default(), &stop).unwrap();
        move || carried_by(listener.accept(&StreamOptions::default(), &Stop::never()).unwrap())
    };
    let folder = certificates.display();
    let arguments = match near_is_encrypted {
        true => vec![format!("--listen-tls-dir={folder}")],
        false => vec![format!("--tls-dir={folder}"), "--tls-hostname=localhost".into()],
    };
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut relayed =
        Relayed::start_between(dir, Output::File, &arguments, &setup(), &mut Vec::new(), connects, listens);
    relayed.give_away();
    relayed.signal(Signal::KILL);
    relayed.status();
    relayed
}

fn hears(relayed: &Relayed, words: &str) {
    let says = || relayed.said().contains(words).then_some(());
    Deadline::seconds(60).poll(words, || relayed.said(), says);
}

/// A QEMU goes on when its connection ends without an answer.
#[test]
fn an_encrypted_source_of_a_killed_relay_is_freed_by_the_end_of_its_connection_alone() {
    for answers in [true, false] {
        let dir = scratch();
        let mut relayed = killed(dir.path(), true);
        hears(&relayed, "waits for the far end's answer");
        relayed.source_is_held("nobody has decided");
        if answers {
            relayed.far.write_all(&shut(1)).unwrap();
        } else {
            relayed.decide();
        }
        assert_eq!(relayed.told(), [0u8; 0], "{}", relayed.said());
        hears(&relayed, "ends without a report: the source, a QEMU, goes on");
        relayed.guardian_ends();
    }
}

#[test]
fn an_encrypted_source_whose_guest_runs_at_the_far_end_is_held_until_it_has_gone() {
    let dir = scratch();
    let mut relayed = killed(dir.path(), true);
    relayed.far.write_all(&shut(0)).unwrap();
    hears(&relayed, "the guest runs at the far end, which can't be told to the source");
    // It is known that the guest runs: no signal decides otherwise.
    relayed.decide();
    relayed.source_is_held("the guest runs at the far end");
    relayed.source.shutdown(Shutdown::Both).unwrap();
    hears(&relayed, "the source has gone");
    relayed.guardian_ends();
}

#[test]
fn the_answer_of_an_encrypted_far_end_is_not_read_and_an_operator_decides() {
    let dir = scratch();
    let mut relayed = killed(dir.path(), false);
    hears(&relayed, "can't read the far end's answer");
    relayed.source_is_held("nobody has decided");
    relayed.decide();
    let mut told = vec![0; shut(1).len()];
    relayed.source.read_exact(&mut told).unwrap();
    assert_eq!(told, shut(1));
    relayed.source.shutdown(Shutdown::Both).unwrap();
    relayed.guardian_ends();
}
