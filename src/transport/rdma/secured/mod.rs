//! RDMA between two ends that know each other: a TLS connection beside the queue pairs.
//!
//! A destination with TLS listens by TCP at the same port. The source connects there first; both ends verify each other's
//! certificate, and each sends random bytes. From these both derive
//!
//! - a proof in the private data of every connection: a destination rejects a queue pair without it, and a source leaves a
//!   destination whose answer lacks it;
//! - a key for the messages of each direction of each queue pair: greeting, RAM block tables, keys of memory regions,
//!   fingerprints, device state, and pages that travel in the stream.
//!
//! Messages stay on the queue pair instead of the TLS connection, since a queue pair delivers a message after the writes
//! that it speaks of, and a TCP connection has no order with them.
//!
//! Not encrypted are the pages that the devices write or read, and the header of each such packet: the address and the key of
//! the memory region. A key serves only the queue pairs of this migration. Who can forge packets of theirs in the network
//! can write with it; IPsec or MACsec below prevent that.

mod fabric;
mod keys;
#[cfg(test)]
pub(super) mod tests;

use std::sync::Arc;
use std::time::Duration;

use rdma_hooks::fabric::Listener;
use rdma_hooks::{Fabric, FabricError};

use super::RdmaListener;
use crate::error::Chain;
use crate::sys::{SendPart, Stop, StopReason};
use crate::transport::open::candidates::{Candidates, QUEUE_PAIRS};
use crate::transport::open::{Endpoint, Sockets, no_stream};
use crate::transport::page_server::fill;
use crate::transport::stream::tcp::TcpListener;
use crate::transport::{
    Address, AllowList, ByteSink as _, ChannelError, ConnectionOptions, DECISION_TIMEOUT,
    DestinationConnection, OpenError, Side, StreamChannel, StreamOptions, Tls, connect,
};
use fabric::{SecuredFabric, SecuredListener};
use keys::{SHARE_BYTES, Secret, Share, share};

const ASKING: &str = "agreeing on keys for RDMA by TLS";

/// How long one end may take for its part over TLS.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a source may take to connect its queue pairs after it came by TLS.
const QUEUE_PAIRS_TIMEOUT: Duration = Duration::from_secs(30);
/// The same where the source may come by a stream instead: it has decided after [`DECISION_TIMEOUT`], which began earlier.
const UNDECIDED_TIMEOUT: Duration = Duration::from_secs(DECISION_TIMEOUT.as_secs() + 1);
/// Interval at which a destination rejects those that ask for a queue pair without TLS.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// The first word, and one end's contribution.
const HELLO_BYTES: usize = 4 + SHARE_BYTES;

/// Makes the TLS connection beside `rdma:HOST:PORT`; the fabric for the queue pairs.
///
/// # Errors
/// [`OpenError`]: as of a `tcp:` address with TLS.
pub(super) fn beside(
    fabric: Arc<dyn Fabric>,
    address: &Address,
    tls: &Tls,
    options: &StreamOptions,
    stop: &Stop,
) -> Result<Arc<dyn Fabric>, OpenError> {
    let (host, port) = address.host();
    let mut channel = connect(&Address::tcp(host, port).with_tls(tls.clone()), options, stop)?;
    let secret = ask(&mut channel, stop)?;
    Ok(Arc::new(SecuredFabric { inner: fabric, secret }))
}

fn ask(channel: &mut StreamChannel, stop: &Stop) -> Result<Secret, ChannelError> {
    let stop = stop.within(ANSWER_TIMEOUT);
    let ours = send(channel, &stop)?;
    let theirs = receive(channel, &stop)?;
    channel.say_end_at_once();
    Ok(Secret::of(&ours, &theirs))
}

fn answer(channel: &mut StreamChannel, stop: &Stop) -> Result<Secret, ChannelError> {
    let stop = stop.within(ANSWER_TIMEOUT);
    let theirs = receive(channel, &stop)?;
    let ours = send(channel, &stop)?;
    channel.say_end_at_once();
    Ok(Secret::of(&theirs, &ours))
}

fn send(channel: &mut StreamChannel, stop: &Stop) -> Result<Share, ChannelError> {
    let none = |source| ChannelError::Io { peer: channel.peer().to_owned(), doing: ASKING, source };
    let ours = share().map_err(none)?;
    let hello = [QUEUE_PAIRS[0].to_be_bytes().as_slice(), &ours].concat();
    channel.send(&[SendPart::Own(&hello)], stop)?;
    Ok(ours)
}

fn receive(channel: &mut StreamChannel, stop: &Stop) -> Result<Share, ChannelError> {
    let mut hello = [0; HELLO_BYTES];
    let peer = channel.peer().to_owned();
    if !fill(channel, &mut hello, ASKING, stop)? {
        return Err(ChannelError::Closed { peer, doing: ASKING });
    }
    let (word, theirs) = hello.split_at(4);
    if word != QUEUE_PAIRS[0].to_be_bytes() {
        let source = Box::new(FabricError::NotAuthentic { what: "what came by TLS" });
        return Err(ChannelError::Rdma { peer, doing: ASKING, side: Side::Peer, source });
    }
    let mut share = Share::default();
    share.copy_from_slice(theirs);
    Ok(share)
}

/// The destination's side of `rdma:HOST:PORT` with TLS.
#[derive(Debug)]
pub(super) struct SecuredRdma {
    rdma: RdmaListener,
    sources: Sockets<TcpListener>,
    address: Address,
}

impl SecuredRdma {
    /// `bind` listens for queue pairs, at the port of the TCP sockets.
    ///
    /// # Errors
    /// [`OpenError`]; that of `bind`.
    pub(super) fn bind(
        address: &Address,
        tls: &Tls,
        allow: AllowList,
        stop: &Stop,
        bind: impl FnOnce(u16) -> Result<RdmaListener, OpenError>,
    ) -> Result<Self, OpenError> {
        let (host, port) = address.host();
        let listening = TcpListener::bind(host, port, allow, stop)?;
        let port = listening.port();
        let addresses = vec![Address::tcp(host, port).with_tls(tls.clone())];
        let sources = Sockets { listening, addresses, open_to_network: true, tls: Some(tls.clone()) };
        Ok(Self { rdma: bind(port)?, sources, address: Address::rdma(host, port).with_tls(tls.clone()) })
    }
}

/// What a source that came by TLS has.
pub(in crate::transport) enum CameByTls {
    /// Queue pairs.
    QueuePairs(DestinationConnection),
    /// Its stream, on the connection with TLS.
    Stream(StreamChannel),
}

/// Waits for a source by TLS at `sources`. If it wants queue pairs it is waited for at `rdma`, and if they don't come, for
/// the next source. `wanted`: the first words that may come by TLS.
///
/// # Errors
/// [`OpenError`]. Where a stream may come as well, a source whose queue pairs fail comes again by it.
pub(in crate::transport) fn accept_by_tls(
    (rdma, sources): (&mut RdmaListener, &Sockets<TcpListener>),
    candidates: &mut Candidates,
    wanted: &[u32],
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<CameByTls, OpenError> {
    let may_be_stream = wanted != QUEUE_PAIRS;
    let patience = if may_be_stream { UNDECIDED_TIMEOUT } else { QUEUE_PAIRS_TIMEOUT };
    loop {
        let mut channel = next_source((rdma, sources), candidates, wanted, &options.stream, stop)?;
        if may_be_stream && channel.peek_word(stop)? != QUEUE_PAIRS[0].to_be_bytes() {
            return Ok(CameByTls::Stream(channel));
        }
        let secret = match answer(&mut channel, stop) {
            Ok(secret) => secret,
            Err(error) => {
                candidates.dismiss(channel.peer(), &Chain(&error).to_string());
                continue;
            }
        };
        let (listener, accepting) = rdma.parts();
        let mut listener = SecuredListener::new(listener, secret);
        let within = stop.within(patience);
        match accepting.accept(&mut listener, &options.stream, &options.rdma, &within) {
            Err(ChannelError::Stopped { reason: StopReason::Deadline, .. }) if stop.reason().is_none() => {
                candidates.dismiss(channel.peer(), "it came by TLS and has connected no queue pair");
            }
            Err(error) if may_be_stream && stop.reason().is_none() => {
                candidates.dismiss(channel.peer(), &Chain(&error).to_string());
            }
            accepted => return Ok(CameByTls::QueuePairs(accepted?)),
        }
    }
}

/// Waits for a source by TLS. Meanwhile everybody who asks for a queue pair is rejected: no proof exists yet.
fn next_source(
    (rdma, sources): (&mut RdmaListener, &Sockets<TcpListener>),
    candidates: &mut Candidates,
    wanted: &[u32],
    options: &StreamOptions,
    stop: &Stop,
) -> Result<StreamChannel, OpenError> {
    loop {
        reject_all(rdma.parts().0, candidates);
        match candidates.next(sources, (wanted, 1), options, &stop.within(POLL_INTERVAL)) {
            Err(error) if is_over(&error) && stop.reason().is_none() => {}
            came => return came,
        }
    }
}

fn reject_all(listener: &mut dyn Listener, candidates: &mut Candidates) {
    let at_once = rdma_hooks::Cancel::default();
    at_once.cancel();
    let at_once = rdma_hooks::Stop::new(None, at_once);
    while let Ok(incoming) = listener.next_request(&at_once) {
        let peer = incoming.peer().map_or_else(|| "rdma:".to_owned(), |peer| format!("rdma:{peer}"));
        drop(incoming);
        candidates.dismiss(&peer, "it asks for a queue pair without TLS, which is required here");
    }
}

/// A wait was long enough.
fn is_over(error: &OpenError) -> bool {
    matches!(error, OpenError::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
}

impl Endpoint for SecuredRdma {
    fn addresses(&self) -> Vec<Address> {
        vec![self.address.clone()]
    }

    /// An RDMA device has no loopback: its peers come from the network.
    fn is_open_to_network(&self) -> bool {
        true
    }

    fn accept_connection(
        &mut self,
        candidates: &mut Candidates,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        let ends = (&mut self.rdma, &self.sources);
        match accept_by_tls(ends, candidates, &QUEUE_PAIRS, options, stop)? {
            CameByTls::QueuePairs(connection) => Ok(connection),
            CameByTls::Stream(_) => {
                no_stream(&self.address, &options.stream, stop).map(DestinationConnection::over)
            }
        }
    }

    fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        no_stream(&self.address, options, stop)
    }
}
