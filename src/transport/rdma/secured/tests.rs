#![allow(clippy::unwrap_used)]
use std::sync::{Arc, Mutex};
use std::thread;

use rdma_hooks::fabric::{Completion, ConnectParams, Endpoint as QueuePair, Listener as _, ReadDepth};
use rdma_hooks::sim::{Host, Part, Sim, SimConfig, SimFabric};
use rdma_hooks::tap::{Posting, Tapped};
use rdma_hooks::{Cancel, Fabric, FabricError};

use super::fabric::{SecuredFabric, SecuredListener};
use super::keys::{COVERED_BYTES, Secret};
use super::{
    CameByTls, QUEUE_PAIRS_TIMEOUT, SecuredRdma, UNDECIDED_TIMEOUT, accept_by_tls, answer, ask, beside,
    next_source,
};
use crate::guest::{GuestMemory, MappedGuest};
use crate::ram::{BlockName, RamBlock};
use crate::sys::{CancelToken, Mapping, RecvPart, SendPart, Stop};
use crate::transport::open::Endpoint;
use crate::transport::open::candidates::{Candidates, EITHER, QUEUE_PAIRS};
use crate::transport::rdma::{RdmaListener, connect_over};
use crate::transport::tls::tests::certificates::Authority;
use crate::transport::{
    Address, AllowList, ByteSink, ByteSource as _, ChannelError, ConnectionOptions, OpenError,
    SourceConnection, StreamOptions, Tls, TlsOptions, connect,
};
use crate::units::PageSize;

/// A destination of `fabric`, and its address for a source whose certificate is of the same authority.
pub(in crate::transport::rdma) fn listening(fabric: Arc<dyn Fabric>) -> (SecuredRdma, Address) {
    let dir = tempfile::tempdir().unwrap();
    let tls = TlsOptions::in_dir(Authority::new("the authority").folder(dir.path().join("tls")));
    let (source, destination) = (Tls::of_source(&tls).unwrap(), Tls::of_destination(&tls).unwrap());
    let bind = |port| Ok(RdmaListener::bind(fabric, "127.0.0.1", port, AllowList::default()).unwrap());
    let at = Address::rdma("127.0.0.1", 0);
    let listening = SecuredRdma::bind(&at, &destination, AllowList::default(), &Stop::never(), bind).unwrap();
    let to = listening.addresses().swap_remove(0).with_tls(source);
    (listening, to)
}

/// A source of `fabric`.
pub(in crate::transport::rdma) fn connected(
    fabric: Arc<dyn Fabric>,
    to: &Address,
    memory: Arc<dyn GuestMemory>,
    options: &ConnectionOptions,
) -> Result<SourceConnection, OpenError> {
    let stop = Stop::never();
    let fabric = match to.tls() {
        Some(tls) => beside(fabric, to, tls, &options.stream, &stop)?,
        None => fabric,
    };
    let (host, port) = to.host();
    Ok(connect_over(fabric, host, port, memory, &options.stream, &options.rdma, &stop)?)
}

fn memory() -> Arc<dyn GuestMemory> {
    let mapping = Mapping::anonymous(1 << 20).unwrap();
    let block = RamBlock::new(BlockName::new("ram").unwrap(), 1 << 20);
    Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build().unwrap())
}

const TEXT: &[u8] = b"as sent by the embedder";

/// All messages that either end of a short connection posted: the source sends `TEXT`, the destination reads it.
fn messages(secured: bool) -> Vec<u8> {
    let sim = Sim::new(SimConfig::default());
    let (near, far) = (sim.fabric(Host::A).enter(), sim.fabric(Host::B).enter());
    let posted = Arc::new(Mutex::new(Vec::new()));
    let tapped = |host| {
        let posted = Arc::clone(&posted);
        Arc::new(Tapped::new(sim.fabric(host), move |posting| {
            if let Posting::Message(parts) = posting {
                posted.lock().unwrap().extend(parts.concat());
            }
        }))
    };
    let (here, there) = (tapped(Host::A), tapped(Host::B));
    let (mut listener, to) = listening(there.clone());
    let plain = Address::rdma("127.0.0.1", 1);
    let mut plain_listener = RdmaListener::bind(there, "127.0.0.1", 1, AllowList::default()).unwrap();
    let to = if secured { to } else { plain };
    let (options, stop) = (ConnectionOptions::default(), Stop::never());
    thread::scope(|scope| {
        let (options, stop) = (&options, &stop);
        scope.spawn(move || {
            // Time stands still while a thread that takes part does anything but wait.
            let _near = near;
            let mut source = connected(here, &to, memory(), options).unwrap();
            source.link.sink().send(&[SendPart::Own(TEXT)], stop).unwrap();
            source.link.sink().flush(stop).unwrap();
        });
        let _far = far;
        let mut destination = match secured {
            true => listener.accept_connection(&mut Candidates::default(), options, stop).unwrap(),
            false => plain_listener.accept(&options.stream, &options.rdma, stop).unwrap(),
        };
        let mut come = [0; TEXT.len()];
        let got = destination.link.stream().recv(&mut [RecvPart::Own(&mut come)], stop).unwrap();
        assert_eq!(&come[..got], TEXT);
    });
    let posted = posted.lock().unwrap();
    posted.clone()
}

#[test]
fn no_message_is_in_clear() {
    let holds = |messages: &[u8]| messages.windows(TEXT.len()).any(|window| window == TEXT);
    assert!(holds(&messages(false)), "this looks at the wrong place");
    let secured = messages(true);
    assert!(secured.len() > TEXT.len() && !holds(&secured));
}

#[test]
fn who_comes_without_tls_is_rejected_and_the_next_source_is_taken() {
    let (sim, _part) = one_thread();
    let (mut listener, to) = listening(Arc::new(sim.fabric(Host::B)));
    let (told, mut candidates) = (Arc::new(Mutex::new(Vec::new())), Candidates::default());
    let tells = Arc::clone(&told);
    candidates.tell(Arc::new(move |text: &str| tells.lock().unwrap().push(text.to_owned())));
    let (options, stop) = (StreamOptions::default(), Stop::never());
    let (theirs, ours) = thread::scope(|scope| {
        let source = scope.spawn(|| {
            let (host, port) = to.host();
            let plain = sim.fabric(Host::A).connect("", port, &params(b"request"), &forever());
            assert!(matches!(plain, Err(FabricError::Event { got: "REJECTED", .. })), "{:?}", plain.err());
            // By TLS, but for another transport.
            let tcp = Address::tcp(host, port).with_tls(to.tls().unwrap().clone());
            let mut other = connect(&tcp, &options, &stop).unwrap();
            other.send(&[SendPart::Own(b"QEVM")], &stop).unwrap();
            let mut channel = connect(&tcp, &options, &stop).unwrap();
            (ask(&mut channel, &stop).unwrap(), other)
        });
        let ends = (&mut listener.rdma, &listener.sources);
        let mut came = next_source(ends, &mut candidates, &QUEUE_PAIRS, &options, &stop).unwrap();
        let secret = answer(&mut came, &stop).unwrap();
        (source.join().unwrap().0, secret)
    });
    let request = [5; COVERED_BYTES];
    assert_eq!(theirs.of_request(&request), ours.of_request(&request));
    let told = told.lock().unwrap().join("\n");
    assert!(told.contains("asks for a queue pair without TLS"), "{told}");
    assert!(told.contains("of a source by tcp:"), "{told}");
}

#[test]
fn a_source_that_connects_no_queue_pair_is_waited_for_half_a_minute() {
    let (sim, _part) = one_thread();
    let (mut listener, to) = listening(Arc::new(sim.fabric(Host::B)));
    let cancel = CancelToken::default();
    let (told, tells) = (Arc::new(Mutex::new(String::new())), cancel.clone());
    let mut candidates = Candidates::default();
    let writes = Arc::clone(&told);
    candidates.tell(Arc::new(move |text: &str| {
        text.clone_into(&mut writes.lock().unwrap());
        tells.cancel();
    }));
    let options = ConnectionOptions::default();
    thread::scope(|scope| {
        scope.spawn(|| {
            let (host, port) = to.host();
            let tcp = Address::tcp(host, port).with_tls(to.tls().unwrap().clone());
            let mut channel = connect(&tcp, &options.stream, &Stop::never()).unwrap();
            ask(&mut channel, &Stop::never()).unwrap();
        });
        let ended = listener.accept_connection(&mut candidates, &options, &Stop::on(&cancel));
        assert!(matches!(ended, Err(OpenError::Channel(ChannelError::Stopped { .. }))));
    });
    assert!(told.lock().unwrap().contains("has connected no queue pair"), "{}", told.lock().unwrap());
    // The rest passed before the simulation began to wait.
    assert!(sim.elapsed() >= QUEUE_PAIRS_TIMEOUT / 2);
}

/// Where a source chooses, as by `auto:`.
#[test]
fn a_source_whose_queue_pairs_fail_is_taken_by_its_stream_and_one_with_queue_pairs_by_those() {
    for by_rdma in [false, true] {
        let sim = Sim::new(SimConfig { threads: if by_rdma { 2 } else { 1 }, ..SimConfig::default() });
        let (near, far) = (by_rdma.then(|| sim.fabric(Host::A).enter()), sim.fabric(Host::B).enter());
        let (mut listener, to) = listening(Arc::new(sim.fabric(Host::B)));
        let (told, mut candidates) = (Arc::new(Mutex::new(String::new())), Candidates::default());
        let writes = Arc::clone(&told);
        candidates.tell(Arc::new(move |text: &str| text.clone_into(&mut writes.lock().unwrap())));
        let (options, stop) = (ConnectionOptions::default(), Stop::never());
        let came = thread::scope(|scope| {
            let (sim, to, options, stop) = (&sim, &to, &options, &stop);
            scope.spawn(move || {
                let _near = near;
                if by_rdma {
                    let fabric = Arc::new(sim.fabric(Host::A));
                    let mut source = connected(fabric, to, memory(), options).unwrap();
                    source.link.sink().send(&[SendPart::Own(TEXT)], stop).unwrap();
                    return source.link.sink().flush(stop).unwrap();
                }
                let (host, port) = to.host();
                let tcp = Address::tcp(host, port).with_tls_of(to);
                ask(&mut connect(&tcp, &options.stream, stop).unwrap(), stop).unwrap();
                let mut stream = connect(&tcp, &options.stream, stop).unwrap();
                stream.send(&[SendPart::Own(b"QEVM")], stop).unwrap();
                // Its word is read, and then the end.
                let _ = stream.recv(&mut [RecvPart::Own(&mut [0])], stop);
            });
            let _far = far;
            let ends = (&mut listener.rdma, &listener.sources);
            accept_by_tls(ends, &mut candidates, &EITHER, options, stop).map(|came| match came {
                CameByTls::QueuePairs(mut connection) => {
                    let mut come = [0; TEXT.len()];
                    let stream = connection.link.stream();
                    assert_eq!(stream.recv(&mut [RecvPart::Own(&mut come)], stop).unwrap(), TEXT.len());
                    None
                }
                CameByTls::Stream(channel) => Some(channel.peek_word(stop).unwrap()),
            })
        });
        assert_eq!(came.unwrap(), (!by_rdma).then_some(*b"QEVM"));
        let told = told.lock().unwrap();
        assert_eq!(told.contains("has connected no queue pair"), !by_rdma, "{told}");
        assert!(by_rdma || sim.elapsed() >= UNDECIDED_TIMEOUT / 2);
    }
}

/// A simulation whose time goes on whenever a thread waits.
fn one_thread() -> (Sim, Part) {
    let sim = Sim::new(SimConfig { threads: 1, ..SimConfig::default() });
    let part = sim.fabric(Host::A).enter();
    (sim, part)
}

fn params(private_data: &[u8]) -> ConnectParams {
    let reads = ReadDepth { own: 0, served: 0 };
    let private_data = private_data.to_vec();
    ConnectParams { private_data, receives: 4, receive_bytes: 64, send_depth: 8, reads, read_pieces: 1 }
}

fn forever() -> rdma_hooks::Stop {
    rdma_hooks::Stop::default()
}

fn at_once() -> rdma_hooks::Stop {
    let cancel = Cancel::default();
    cancel.cancel();
    rdma_hooks::Stop::new(None, cancel)
}

fn secured(fabric: SimFabric, secret: &Secret) -> SecuredFabric {
    SecuredFabric { inner: Arc::new(fabric), secret: secret.clone() }
}

/// Connects by `source`; the destination accepts by `accept`.
fn pair(
    source: impl Fabric,
    accept: impl FnOnce() -> Box<dyn QueuePair>,
) -> (Result<Box<dyn QueuePair>, FabricError>, Box<dyn QueuePair>) {
    thread::scope(|scope| {
        let near = scope.spawn(|| source.connect("", 1, &params(b"request"), &forever()));
        let far = accept();
        (near.join().unwrap(), far)
    })
}

#[test]
fn a_source_leaves_a_destination_whose_answer_has_no_proof() {
    let (sim, _part) = one_thread();
    let secret = Secret::of(&[1; 32], &[2; 32]);
    let mut listener = sim.fabric(Host::B).listen("", 1).unwrap();
    let (near, _far) = pair(secured(sim.fabric(Host::A), &secret), || {
        listener.next_request(&forever()).unwrap().accept(&params(b"reply"), &forever()).unwrap()
    });
    assert!(matches!(near, Err(FabricError::NotAuthentic { .. })), "{:?}", near.err());
}

#[test]
fn a_request_is_taken_once_and_only_with_the_proof_of_this_source() {
    let (sim, _part) = one_thread();
    let secret = Secret::of(&[1; 32], &[2; 32]);
    let mut plain = sim.fabric(Host::B).listen("", 1).unwrap();
    let mut listener = SecuredListener::new(&mut *plain, secret.clone());
    let (near, _far) = pair(secured(sim.fabric(Host::A), &secret), || {
        listener.next_request(&forever()).unwrap().accept(&params(b"reply"), &forever()).unwrap()
    });
    near.unwrap();
    let other = Secret::of(&[1; 32], &[3; 32]);
    for again in [secured(sim.fabric(Host::A), &secret), secured(sim.fabric(Host::A), &other)] {
        thread::scope(|scope| {
            let asks = scope.spawn(|| again.connect("", 1, &params(b"request"), &forever()));
            while !asks.is_finished() {
                assert!(listener.next_request(&at_once()).is_err());
                thread::yield_now();
            }
            assert!(matches!(asks.join().unwrap(), Err(FabricError::Event { got: "REJECTED", .. })));
        });
    }
}

/// Both ends encrypt; one end's messages are copied from another connection.
#[test]
fn a_message_that_was_not_sent_next_ends_the_connection() {
    let (sim, _part) = one_thread();
    let secret = Secret::of(&[1; 32], &[2; 32]);
    let copied = Arc::new(Mutex::new(Vec::new()));
    let copies = Arc::clone(&copied);
    let tapped = Tapped::new(sim.fabric(Host::A), move |posting| {
        if let Posting::Message(parts) = posting {
            copies.lock().unwrap().push(parts.concat());
        }
    });
    let source = SecuredFabric { inner: Arc::new(tapped), secret: secret.clone() };
    let mut plain = sim.fabric(Host::B).listen("", 1).unwrap();
    let mut listener = SecuredListener::new(&mut *plain, secret.clone());
    let (near, mut far) = pair(source, || {
        listener.next_request(&forever()).unwrap().accept(&params(b"reply"), &forever()).unwrap()
    });
    let mut near = near.unwrap();
    near.post_send(1, &[b"first, ", b"in parts"]).unwrap();
    let first = received(&mut *far).unwrap();
    assert_eq!(first, b"first, in parts");
    near.post_send(2, &[b"second"]).unwrap();
    assert_eq!(received(&mut *far).unwrap(), b"second");

    // A source that repeats the first message of a connection in the place of its second.
    let bytes = copied.lock().unwrap()[0].clone();
    let mut plain = sim.fabric(Host::B).listen("", 2).unwrap();
    let mut listener = SecuredListener::new(&mut *plain, secret.clone());
    let request = [b"request".to_vec(), vec![0; 33]].concat();
    let proof = secret.of_request(request.as_slice().try_into().unwrap());
    let fabric = sim.fabric(Host::A);
    let (mut near, mut far) = thread::scope(|scope| {
        let asks = scope
            .spawn(|| fabric.connect("", 2, &params(&[request.as_slice(), &proof].concat()), &forever()));
        let incoming = listener.next_request(&forever()).unwrap();
        let far = incoming.accept(&params(b"reply"), &forever()).unwrap();
        (asks.join().unwrap().unwrap(), far)
    });
    near.post_send(1, &[&bytes]).unwrap();
    assert_eq!(received(&mut *far).unwrap(), b"first, in parts");
    near.post_send(2, &[&bytes]).unwrap();
    assert!(matches!(received(&mut *far), Err(FabricError::NotAuthentic { .. })));
}

fn received(endpoint: &mut dyn QueuePair) -> Result<Vec<u8>, FabricError> {
    let mut done = Vec::new();
    loop {
        endpoint.poll(&mut done)?;
        for completion in done.drain(..) {
            if let Completion::Received { slot } = completion {
                let message = endpoint.received(slot).to_vec();
                endpoint.repost(slot)?;
                return Ok(message);
            }
        }
        endpoint.wait(std::time::Duration::from_millis(10))?;
    }
}
