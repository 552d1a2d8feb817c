//! `auto:HOST:PORT`: RDMA if both ends have a device that reaches the other, else TCP, and why.
//!
//! The destination listens for both at one port. The source tries RDMA first, within [`DECISION_TIMEOUT`].

use std::sync::Arc;
#[cfg(feature = "rdma")]
use std::time::Duration;

use super::candidates::{Candidates, MAIN};
use super::obstacle;
use super::open_stream;
#[cfg(feature = "rdma")]
use crate::error::Chain;
use crate::guest::GuestMemory;
use crate::sys::{Stop, StopReason};
use crate::transport::stream::tcp::TcpListener;
use crate::transport::{
    Address, AllowList, ChannelError, ConnectionOptions, DestinationConnection, OpenError, RdmaOptions,
    SourceConnection, StreamOptions, Way, WhyNoRdma,
};
#[cfg(feature = "rdma")]
use crate::units::BlockIndex;

#[cfg(feature = "rdma")]
use super::obstacle::{DECISION_TIMEOUT, Obstacle};
#[cfg(feature = "rdma")]
use crate::transport::rdma::{RdmaListener, connect_here, usable_address};

/// How often a destination looks who came by the other way.
#[cfg(feature = "rdma")]
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Opens the better of both ways to `host:port`.
pub(super) fn open_source(
    (host, port): (&str, u16),
    memory: Arc<dyn GuestMemory>,
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    let tried = match options.channels.count {
        0 => by_rdma((host, port), Arc::clone(&memory), &options.stream, &options.rdma, stop),
        _ => {
            return Err(OpenError::NoChannels {
                address: Address::Auto { host: host.to_owned(), port }.to_string(),
            });
        }
    };
    let why = match tried {
        Ok(mut connection) => {
            connection.way.why = "both ends have an RDMA device that reaches the other".into();
            return Ok(connection);
        }
        Err(error) if stop.reason() == Some(StopReason::Cancelled) => return Err(error),
        Err(error) => obstacle::why(&error),
    };
    let by_tcp = Address::Tcp { host: host.to_owned(), port };
    let way = Way { transport: "tcp", why: why.clone() };
    open_stream(&by_tcp, memory, options, way, stop).map_err(|error| match error {
        OpenError::Channel(ChannelError::Stopped { .. }) => error,
        error => OpenError::Neither {
            address: Address::Auto { host: host.to_owned(), port }.to_string(),
            rdma: why,
            tcp: Box::new(error),
        },
    })
}

#[cfg(feature = "rdma")]
fn by_rdma(
    (host, port): (&str, u16),
    memory: Arc<dyn GuestMemory>,
    options: &StreamOptions,
    rdma: &RdmaOptions,
    stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    let no =
        |why| OpenError::NoRdma { address: Address::Auto { host: host.to_owned(), port }.to_string(), why };
    // Asked here first: once the peer has taken the connection, nobody waits for another.
    if rdma.may_discard {
        return Err(no(WhyNoRdma::GuestDiscards));
    }
    let table = memory.table();
    let moves = |index: &usize| memory.region(BlockIndex(*index as u32)).is_none();
    if let Some(block) = (0..table.blocks().len()).find(moves) {
        let block = table.blocks()[block].name.to_string();
        return Err(no(WhyNoRdma::NotInPlace { block }));
    }
    let locked = rdma.pin_budget.filter(|_| !rdma.pin_all).unwrap_or(u64::MAX).min(table.travelling());
    usable_address(locked).map_err(no)?;
    // From here on: what it took to look at this host's devices leaves the peer no less time to answer.
    let options = StreamOptions { dead_peer: DECISION_TIMEOUT, ..*options };
    connect_here(host, port, memory, &options, rdma, &stop.within(DECISION_TIMEOUT))
}

#[cfg(not(feature = "rdma"))]
fn by_rdma(
    (host, port): (&str, u16),
    _memory: Arc<dyn GuestMemory>,
    _options: &StreamOptions,
    _rdma: &RdmaOptions,
    _stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    let address = Address::Auto { host: host.to_owned(), port }.to_string();
    Err(OpenError::NoRdma { address, why: WhyNoRdma::NotBuilt })
}

/// Waits for a source by either way.
#[derive(Debug)]
pub(super) struct AutoListener {
    tcp: TcpListener,
    #[cfg(feature = "rdma")]
    rdma: Option<RdmaListener>,
    /// Why only TCP is listened on.
    pub(super) why_not: Option<String>,
}

impl AutoListener {
    /// TCP decides about the port; RDMA is left out where it can't be had.
    pub(super) fn bind(host: &str, port: u16, allow: AllowList, stop: &Stop) -> Result<Self, OpenError> {
        let tcp = TcpListener::bind(host, port, allow.clone(), stop)?;
        #[cfg(feature = "rdma")]
        {
            if tcp.is_loopback() {
                // Without a host that is this machine alone; on a device everybody who reaches it could connect.
                let no_device = Obstacle::NoDevice;
                let why_not =
                    format!("RDMA did not work: {no_device}: the loopback has none; name an address of one");
                let why_not = Some(why_not);
                return Ok(Self { tcp, rdma: None, why_not });
            }
            let port = tcp.port();
            let address = Address::Auto { host: host.to_owned(), port };
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

    pub(super) fn tcp(&self) -> &TcpListener {
        &self.tcp
    }

    /// The first source that comes, by whatever way.
    pub(super) fn accept(
        &mut self,
        candidates: &mut Candidates,
        options: &StreamOptions,
        rdma: &RdmaOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        #[cfg(feature = "rdma")]
        if let Some(listener) = &mut self.rdma {
            return accept_either((&self.tcp, candidates), listener, options, rdma, stop);
        }
        #[cfg(not(feature = "rdma"))]
        let _ = rdma;
        let why = self.why_not.clone().unwrap_or_default();
        let channel = candidates.next(&self.tcp, (&MAIN, 1), options, stop)?;
        Ok(DestinationConnection::over(channel).by(Way { transport: "tcp", why }))
    }
}

/// Whether RAM can be locked is known only when a guest is here; a host's own is a bound for it.
#[cfg(feature = "rdma")]
fn host_memory() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// Both are waited for at once, RDMA on a thread of its own, since its handshake must not be cut into slices.
#[cfg(feature = "rdma")]
fn accept_either(
    (tcp, candidates): (&TcpListener, &mut Candidates),
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
                        tracing::warn!(error = %Chain(&error), "a source did not come in by RDMA; it may try TCP");
                        rdma_stop.sleep(POLL_INTERVAL);
                    }
                }
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "no thread to wait for RDMA: TCP only");
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
        // Whoever comes by RDMA at the same moment is the same source, and has decided.
        if let Ok(connection) = connections.recv() {
            return Ok(connection);
        }
        let why = "the source came by TCP: it says why".into();
        Ok(DestinationConnection::over(came?).by(Way { transport: "tcp", why }))
    })
}
