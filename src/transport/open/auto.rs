//! `auto:HOST:PORT`: RDMA if both ends have a device that reaches the other, otherwise TCP, with the reason.
//!
//! The destination listens for both at one port. The source tries RDMA first, within [`DECISION_TIMEOUT`].
//!
//! With TLS every source comes by TCP first, and says there whether its queue pairs follow or its stream.

#[cfg(feature = "rdma")]
use std::time::Duration;

#[cfg(all(feature = "rdma", feature = "tls"))]
use super::candidates::EITHER;
use super::candidates::{self, Candidates, MAIN};
use super::listener::Sockets;
use super::scheme::{Endpoint, Opening, Scheme, SchemeAbilities, TlsCover, no_stream, rdma_scheme};
use super::{DECISION_TIMEOUT, obstacle, parse_host, rdma_address};
#[cfg(feature = "rdma")]
use crate::error::Chain;
use crate::guest::GuestMemory;
use crate::sys::{Stop, StopReason};
#[cfg(all(feature = "rdma", feature = "tls"))]
use crate::transport::rdma::{CameByTls, accept_by_tls};
#[cfg(feature = "rdma")]
use crate::transport::rdma::{RdmaListener, usable_address};
use crate::transport::stream::tcp::{self, TcpListener};
use crate::transport::{
    Address, AllowList, ChannelError, ChosenTransport, ConnectionOptions, DestinationConnection, OpenError,
    SourceConnection, StreamChannel, StreamOptions, WhyNoRdma,
};
#[cfg(feature = "rdma")]
use crate::transport::{Obstacle, RdmaOptions};
use crate::units::BlockIndex;

/// Interval at which a destination checks for a source on the other transport.
#[cfg(feature = "rdma")]
const POLL_INTERVAL: Duration = Duration::from_millis(50);

pub(super) static SCHEME: Scheme = Scheme {
    name: "auto",
    form: "auto:HOST:PORT (RDMA, or else TCP)",
    hint: "auto:HOST:PORT, an IPv6 address as auto:[::1]:4444",
    parse: parse_host,
    abilities: SchemeAbilities {
        page_channels: false,
        pages_in_stream: true,
        answers: true,
        tls: TlsCover::AllButPages,
        decides_late: true,
    },
    open,
    connect: no_stream,
    listen: |address, allow, stop| Ok(Box::new(AutoListener::bind(address, allow, stop)?)),
};

/// Opens the better of both transports to `host:port`.
fn open(opening: &Opening<'_>) -> Result<SourceConnection, OpenError> {
    let (host, port) = opening.address.host();
    let why = match by_rdma(opening) {
        Ok(mut connection) => {
            connection.chosen.why = "both ends have an RDMA device that reaches the other".into();
            return Ok(connection);
        }
        Err(error) if opening.stop.reason() == Some(StopReason::Cancelled) => return Err(error),
        Err(error) => obstacle::why(&error),
    };
    let address = Address::tcp(host, port).with_tls_of(opening.address);
    let by_tcp = Opening { address: &address, ..*opening };
    match (tcp::SCHEME.open)(&by_tcp) {
        Ok(mut connection) => {
            connection.chosen.why = why;
            Ok(connection)
        }
        Err(error @ OpenError::Channel(ChannelError::Stopped { .. })) => Err(error),
        Err(error) => {
            Err(OpenError::Neither { address: opening.address.to_string(), rdma: why, tcp: Box::new(error) })
        }
    }
}

fn by_rdma(opening: &Opening<'_>) -> Result<SourceConnection, OpenError> {
    let Opening { address, memory, options, stop } = *opening;
    check_rdma(&**memory, options).map_err(|why| OpenError::NoRdma { address: address.to_string(), why })?;
    // The limit starts here, so that the time spent on this host's devices does not shorten the peer's time to answer.
    let mut options = options.clone();
    options.stream.dead_peer = DECISION_TIMEOUT;
    let (host, port) = address.host();
    let (address, stop) = (Address::rdma(host, port).with_tls_of(address), stop.within(DECISION_TIMEOUT));
    (rdma_scheme().open)(&Opening { address: &address, options: &options, stop: &stop, memory })
}

/// Checked before connecting: once the peer has accepted the connection, it waits for no other.
fn check_rdma(memory: &dyn GuestMemory, options: &ConnectionOptions) -> Result<(), WhyNoRdma> {
    let rdma = &options.rdma;
    if rdma.may_discard {
        return Err(WhyNoRdma::GuestDiscards);
    }
    let table = memory.table();
    let moves = |index: &usize| memory.region(BlockIndex(*index as u32)).is_none();
    if let Some(block) = (0..table.blocks().len()).find(moves) {
        return Err(WhyNoRdma::NotInPlace { block: table.blocks()[block].name.to_string() });
    }
    let locked = rdma.pin_budget.filter(|_| !rdma.pin_all).unwrap_or(u64::MAX).min(table.travelling());
    rdma_address(locked).map(drop)
}

/// Waits for a source on either transport.
#[derive(Debug)]
pub(super) struct AutoListener {
    tcp: Sockets<TcpListener>,
    #[cfg(feature = "rdma")]
    rdma: Option<RdmaListener>,
    /// Why it listens on TCP only.
    why_not: Option<String>,
}

impl AutoListener {
    /// TCP chooses the port; RDMA is omitted if it is not available.
    fn bind(address: &Address, allow: AllowList, stop: &Stop) -> Result<Self, OpenError> {
        let tcp = Sockets::of_tcp(address, allow.clone(), stop, Address::auto)?;
        #[cfg(feature = "rdma")]
        {
            if !tcp.open_to_network {
                // Without a host, only this machine can connect; on an RDMA device every host that reaches it could
                // connect.
                let no_device = Obstacle::NoDevice;
                let why_not =
                    format!("RDMA did not work: {no_device}: the loopback has none; name an address of one");
                let why_not = Some(why_not);
                return Ok(Self { tcp, rdma: None, why_not });
            }
            let (host, port) = (address.host().0, tcp.listening.port());
            let address = Address::auto(host, port);
            let no = |why| OpenError::NoRdma { address: address.to_string(), why };
            let rdma =
                usable_address(host_memory()).map_err(no).map_err(|error| obstacle::why(&error)).and_then(
                    |_| RdmaListener::bind_here(host, port, allow).map_err(|error| obstacle::why(&error)),
                );
            let (rdma, why_not) = match rdma {
                Ok(listener) => (Some(listener), None),
                Err(why) => (None, Some(why)),
            };
            Ok(Self { tcp, rdma, why_not })
        }
        #[cfg(not(feature = "rdma"))]
        Ok(Self { tcp, why_not: Some(WhyNoRdma::NotBuilt.to_string()) })
    }
}

impl Endpoint for AutoListener {
    fn addresses(&self) -> Vec<Address> {
        self.tcp.addresses()
    }

    fn is_open_to_network(&self) -> bool {
        self.tcp.is_open_to_network()
    }

    /// The first source that connects, by either transport.
    fn accept_connection(
        &mut self,
        candidates: &mut Candidates,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        #[cfg(feature = "rdma")]
        if let Some(listener) = &mut self.rdma {
            #[cfg(feature = "tls")]
            if self.tcp.tls.is_some() {
                let came = accept_by_tls((listener, &self.tcp), candidates, &EITHER, options, stop)?;
                return Ok(match came {
                    CameByTls::QueuePairs(connection) => connection,
                    CameByTls::Stream(channel) => over_tcp(channel),
                });
            }
            return accept_either((&self.tcp, candidates), listener, &options.stream, &options.rdma, stop);
        }
        let why = self.why_not.clone().unwrap_or_default();
        let channel = candidates.next(&self.tcp, (&MAIN, 1), &options.stream, stop)?;
        Ok(DestinationConnection::over(channel).by(ChosenTransport { transport: "tcp", why }))
    }

    /// Behind the first connection all come by TCP: a migration that has lost one by RDMA goes on so.
    fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        Ok(candidates::accept(&self.tcp, options, stop)?)
    }

    fn why_no_rdma(&self) -> Option<&str> {
        self.why_not.as_deref()
    }
}

/// Whether RAM can be locked is known only when the guest arrives; the host's own RAM is an upper bound.
#[cfg(feature = "rdma")]
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// Waits for both at once, RDMA on a thread of its own, since its handshake must not be cut into slices.
#[cfg(feature = "rdma")]
fn accept_either(
    (tcp, candidates): (&Sockets<TcpListener>, &mut Candidates),
    listener: &mut RdmaListener,
    options: &StreamOptions,
    rdma: &RdmaOptions,
    stop: &Stop,
) -> Result<DestinationConnection, OpenError> {
    let enough = crate::sys::CancelToken::default();
    let (give, connections) = crossbeam::channel::bounded(1);
    let rdma_stop = Stop::on(&enough);
    std::thread::scope(|scope| {
        let waiting = std::thread::Builder::new().name("ramwire-rdma".into());
        let spawned = waiting.spawn_scoped(scope, move || {
            while rdma_stop.reason().is_none() {
                match listener.accept(options, rdma, &rdma_stop) {
                    Ok(connection) => return drop(give.send(connection)),
                    Err(_) if rdma_stop.reason().is_some() => return,
                    Err(error) => {
                        tracing::warn!(error = %Chain(&error), "a source could not connect by RDMA; it may try TCP");
                        rdma_stop.sleep(POLL_INTERVAL);
                    }
                }
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "the thread that waits for RDMA could not be started: TCP only");
        }
        let came = loop {
            if let Ok(connection) = connections.try_recv() {
                return Ok(connection);
            }
            match candidates.next(tcp, (&MAIN, 1), options, &stop.within(POLL_INTERVAL)) {
                Err(OpenError::Channel(ChannelError::Stopped { reason: StopReason::Deadline, .. }))
                    if stop.reason().is_none() => {}
                came => break came,
            }
        };
        enough.cancel();
        // A simultaneous RDMA connection is from the same source, which has chosen RDMA.
        if let Ok(connection) = connections.recv() {
            return Ok(connection);
        }
        Ok(over_tcp(came?))
    })
}

/// The connection of a source that could have come by RDMA.
#[cfg(feature = "rdma")]
fn over_tcp(channel: StreamChannel) -> DestinationConnection {
    let why = "the source connected by TCP; its output has the reason".into();
    DestinationConnection::over(channel).by(ChosenTransport { transport: "tcp", why })
}
