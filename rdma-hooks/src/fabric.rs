//! The operations that the protocol needs from a network of queue pairs.
//!
//! A [`Fabric`] makes connections; an [`Endpoint`] is one end of a connected, reliable queue pair with its own receive
//! buffers. Two fabrics exist: [`sim`](crate::sim) inside one process, and `verbs` over a real or emulated NIC. The
//! fabric supplies the clock, so that a simulation can have its own.
//!
//! # Rules every fabric keeps
//!
//! - Writes and messages posted on one endpoint take effect at the peer in order; there is no order between endpoints.
//! - Completions of an endpoint come in the order of its requests. That of a signalled request also completes
//!   everything posted before it on that endpoint.
//! - A request that fails is the last one: its endpoint breaks, and everything posted after it completes as
//!   [`Flushed`](CompletionStatus::Flushed).
//! - No call waits longer than its argument allows, and none longer than [`TICK`](crate::stop::TICK) without looking at
//!   its [`Stop`].
//! - Dropping a [`Registration`] deregisters first and releases the memory afterwards.
//!
//! # RDMA READs
//!
//! [`Endpoint::post_reads`] brings bytes of the peer's registered memory into own registered memory; the peer's process
//! takes no part. The rules are those of the InfiniBand specification:
//!
//! - The bytes are in place when the READ's completion is there, and not before: until then any part of them may be,
//!   in any order. After a failure it is not known which are, even if all READs before it had completed.
//! - A READ gets what writes posted before it on the same endpoint stored. Writes and messages posted *after* it may
//!   take effect at the peer before its bytes are read: post them after its completion. Against other endpoints, and
//!   against what the peer's processors store, there is no order at all: a range that changes meanwhile may come as a
//!   mix of old and new.
//! - At most [`Limits::reads`] are under way at a time. More are refused ([`FabricError::ReadDepth`]) and not queued:
//!   a device holds back everything that is posted behind a READ too many, so the order of those that wait, and what
//!   is urgent among them, is the caller's to decide.
//! - Several endpoints to one peer are independent: a READ on one does not wait for those on another. Endpoints made by
//!   one fabric object through one device share their registrations, so one key serves all of them; each has a depth
//!   of its own. There is no priority between them: a device serves them in turn.

mod error;
mod reads;

use std::any::Any;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(crate) use error::chain;
pub use error::{CompletionStatus, FabricError, Operation};
pub(crate) use reads::Reads;
pub use reads::{ReadDepth, ReadPiece, ReadRequest};

use crate::region::HostRegion;
use crate::stop::Stop;

/// A right on registered memory. [`Endpoint::register`] takes several, and every right includes [`Access::Read`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// This end's NIC reads it: source of writes.
    Read,
    /// This end's NIC writes to it: target of this end's READs (`IBV_ACCESS_LOCAL_WRITE` of `ibv_reg_mr(3)`).
    LocalWrite,
    /// The peer may write to it (`IBV_ACCESS_REMOTE_WRITE`), but not read it. Includes [`Access::LocalWrite`], as
    /// `ibv_reg_mr(3)` demands.
    RemoteWrite,
    /// The peer may read it (`IBV_ACCESS_REMOTE_READ`), but not write to it.
    RemoteRead,
}

impl Access {
    /// Whether these rights let this end's NIC write.
    pub(crate) fn writes_locally(rights: &[Self]) -> bool {
        rights.iter().any(|right| matches!(right, Self::LocalWrite | Self::RemoteWrite))
    }
}

/// Which addresses name the registered bytes on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressBase {
    /// Their addresses in this process.
    Host,
    /// Counted from this number, so that no host address leaves the process.
    At(u64),
}

/// Registered memory. Dropping it deregisters, then releases the memory.
pub struct Registration {
    /// Names it in requests of this end.
    pub lkey: u32,
    /// Names it in requests of the peer.
    pub rkey: u32,
    /// Address of its first byte in requests of either end.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// The memory need not be resident: its pages are faulted in when the device uses them.
    pub on_demand: bool,
    /// Deregisters the memory when dropped.
    pub guard: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registration({:#x}+{:#x}, rkey {:#x})", self.address, self.len, self.rkey)
    }
}

/// Registers memory as resident. Memory that cannot be made resident (a file system with DAX) is registered on demand,
/// where the device offers that. Resident registration is preferred: a write to a page that is not present costs the
/// source's transport retries, which a QEMU source does not have. Returns which kind it became.
///
/// # Errors
///
/// The registration's error.
pub(crate) fn register_resident_or_on_demand<T>(
    offered: bool,
    mut register: impl FnMut(bool) -> Result<T, FabricError>,
) -> Result<(T, bool), FabricError> {
    match register(false) {
        Err(FabricError::Registration { source, .. })
            if offered && source.raw_os_error() == Some(libc::EOPNOTSUPP) =>
        {
            register(true).map(|registered| (registered, true))
        }
        done => done.map(|registered| (registered, false)),
    }
}

/// One RDMA WRITE. A WRITE without bytes is a probe: the peer's NIC acknowledges it, and it needs no key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteRequest {
    /// Given back by the completion. Ids of an endpoint ascend.
    pub id: u64,
    /// [`Registration::lkey`] of the bytes.
    pub lkey: u32,
    /// Where they are, in terms of [`Registration::address`].
    pub from: u64,
    /// How many.
    pub len: u32,
    /// The peer's key.
    pub rkey: u32,
    /// The peer's address.
    pub to: u64,
    /// Ask for a completion.
    pub signalled: bool,
}

/// What became of something posted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completion {
    /// The send, write or READ with this id, and all before it, took effect.
    Done {
        /// As posted.
        id: u64,
    },
    /// A message arrived in a receive buffer.
    Received {
        /// Which buffer; to be [reposted](Endpoint::repost).
        slot: usize,
    },
    /// A request failed; everything after it will fail too.
    Failed {
        /// The posted request.
        operation: Operation,
        /// How it ended.
        status: CompletionStatus,
        /// The device's own code.
        vendor: u32,
    },
}

/// State of a connection, as the connection manager reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkState {
    /// Nothing is known to be wrong.
    Up,
    /// The peer disconnected, or the kernel of its host closed the connection after it died.
    Disconnected,
    /// This end's device is gone.
    DeviceRemoved,
}

/// Limits and abilities of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum number of requests (sends, writes and READs) outstanding at a time.
    pub send_depth: usize,
    /// Messages up to this many bytes travel inside the request.
    pub inline_bytes: usize,
    /// Longest registration, bytes.
    pub max_registration_bytes: u64,
    /// Registered memory need not be resident.
    pub on_demand: bool,
    /// READs at a time, as agreed with the peer when the connection was made.
    pub reads: ReadDepth,
    /// Pieces of own memory that one READ may fill.
    pub read_pieces: usize,
    /// Longest READ, bytes: that of the port's messages.
    pub read_bytes: u64,
}

/// How to connect or accept.
#[derive(Clone, Debug)]
pub struct ConnectParams {
    /// Private data to send; at most 56 bytes.
    pub private_data: Vec<u8>,
    /// Receive buffers, all posted before the peer can send.
    pub receives: usize,
    /// Bytes in each.
    pub receive_bytes: usize,
    /// Maximum number of requests outstanding at a time; READs count.
    pub send_depth: usize,
    /// READs to ask for, in both directions. A device that offers less and a peer that allows less are no error:
    /// [`Limits::reads`] says what was agreed.
    pub reads: ReadDepth,
    /// Pieces of own memory that one READ may fill, to ask for: 1 or more. Each makes all requests of the queue pair
    /// larger by a few bytes. [`Limits::read_pieces`] says what the device takes.
    pub read_pieces: usize,
}

/// Makes connections.
pub trait Fabric: Send + Sync {
    /// Connects a queue pair to `host:port`. Several queue pairs made by one fabric object through the same device
    /// share its registrations.
    ///
    /// # Errors
    ///
    /// The reason why the connection could not be made, with the step's name.
    fn connect(
        &self,
        host: &str,
        port: u16,
        params: &ConnectParams,
        stop: &Stop,
    ) -> Result<Box<dyn Endpoint>, FabricError>;

    /// Listens for connections. Port 0 takes any.
    ///
    /// # Errors
    ///
    /// No device, or the address is taken or not one of an RDMA device.
    fn listen(&self, host: &str, port: u16) -> Result<Box<dyn Listener>, FabricError>;

    /// The fabric's clock; deadlines count by it.
    fn now(&self) -> Instant;
}

/// Waits for connections.
pub trait Listener: Send {
    /// The port listened on.
    fn port(&self) -> u16;

    /// The next peer that wants to connect.
    ///
    /// # Errors
    ///
    /// [`FabricError::Stopped`], or the listener broke.
    fn next_request(&mut self, stop: &Stop) -> Result<Box<dyn Incoming>, FabricError>;
}

/// A peer that wants to connect. Dropping it rejects the connection.
pub trait Incoming: Send {
    /// The peer's private data, possibly padded.
    fn private_data(&self) -> &[u8];
    /// The peer's address, if it has one.
    fn peer(&self) -> Option<SocketAddr>;
    /// Connects.
    ///
    /// # Errors
    ///
    /// The reason why the connection could not be made.
    fn accept(self: Box<Self>, params: &ConnectParams, stop: &Stop)
    -> Result<Box<dyn Endpoint>, FabricError>;
}

/// One end of a connected queue pair. Dropping it disconnects and frees everything.
pub trait Endpoint: Send {
    /// The private data of the peer's reply, possibly padded. Empty on the accepting side.
    fn private_data(&self) -> &[u8];

    /// What the device can do.
    fn limits(&self) -> Limits;

    /// The fabric's clock.
    fn now(&self) -> Instant;

    /// Whether this process may lock `bytes` of memory, before it tries.
    ///
    /// # Errors
    ///
    /// [`FabricError::MemoryLock`] with the limit.
    fn check_memory_lock(&self, bytes: u64) -> Result<(), FabricError> {
        let _ = bytes;
        Ok(())
    }

    /// Registers memory for this endpoint's domain with all of these rights; none are [`Access::Read`] alone.
    ///
    /// # Errors
    ///
    /// [`FabricError::Registration`] with the remedy, [`FabricError::NotPinned`].
    fn register(
        &self,
        region: &HostRegion,
        access: &[Access],
        base: AddressBase,
    ) -> Result<Registration, FabricError>;

    /// Posts a chain of writes with one doorbell. After an error the endpoint can only be dropped.
    ///
    /// # Errors
    ///
    /// [`FabricError::QueueFull`], [`FabricError::Verb`].
    fn post_writes(&mut self, chain: &[WriteRequest]) -> Result<(), FabricError>;

    /// Posts a chain of READs with one doorbell: `IBV_WR_RDMA_READ` of `ibv_post_send(3)`. A READ is under way until
    /// [`poll`](Self::poll) has given its completion; [`Limits::reads`] says how many may be. See the
    /// [module](self#rdma-reads) for what a completion says.
    ///
    /// The memory named by [`ReadRequest::into`] must stay registered until then, or until the endpoint is dropped.
    ///
    /// # Errors
    ///
    /// [`FabricError::ReadDepth`] and [`FabricError::ReadShape`]: nothing was posted, and the endpoint is usable. After
    /// [`FabricError::QueueFull`] and [`FabricError::Verb`] it can only be dropped.
    ///
    /// What the peer refuses is a [`Completion::Failed`]: [`RemoteAccess`](CompletionStatus::RemoteAccess) if its key
    /// does not cover the range, is dead or is without [`Access::RemoteRead`];
    /// [`LocalProtection`](CompletionStatus::LocalProtection) if an own key does not cover its piece or is without
    /// [`Access::LocalWrite`].
    fn post_reads(&mut self, chain: &[ReadRequest<'_>]) -> Result<(), FabricError>;

    /// Posts one message, copied from `parts` in order; always signalled.
    ///
    /// # Errors
    ///
    /// [`FabricError::QueueFull`], [`FabricError::Verb`].
    fn post_send(&mut self, id: u64, parts: &[&[u8]]) -> Result<(), FabricError>;

    /// Appends the completions; never waits.
    ///
    /// # Errors
    ///
    /// [`FabricError::Verb`]. Failed requests are [`Completion::Failed`], no error of this call.
    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), FabricError>;

    /// The bytes received in a buffer.
    fn received(&self, slot: usize) -> &[u8];

    /// Posts a receive buffer again.
    ///
    /// # Errors
    ///
    /// [`FabricError::Verb`].
    fn repost(&mut self, slot: usize) -> Result<(), FabricError>;

    /// Sleeps until a completion or a link event may have arrived, at most `at_most`.
    ///
    /// # Errors
    ///
    /// [`FabricError::Verb`].
    fn wait(&mut self, at_most: Duration) -> Result<(), FabricError>;

    /// Looks for completions without sleeping, at most `at_most`: for a wait that is so short that waking up would be a
    /// large part of it. `false` if none came, at once where a look takes no time of the fabric's clock.
    ///
    /// # Errors
    ///
    /// [`FabricError::Verb`].
    fn look(&mut self, at_most: Duration) -> Result<bool, FabricError> {
        let _ = at_most;
        Ok(false)
    }

    /// A number that changes when this end's device receives from the peer, RDMA WRITEs as well as messages; `None` if
    /// the device can't be queried. The query may cost the device a command: use it in an occasional wait, not on the
    /// page path.
    fn received_mark(&self) -> Option<u64>;

    /// The state that the connection manager reports. Never waits.
    ///
    /// # Errors
    ///
    /// [`FabricError::Verb`].
    fn link(&mut self) -> Result<LinkState, FabricError>;

    /// Ends the connection; outstanding requests are flushed.
    fn disconnect(&mut self);

    /// The calling thread uses this endpoint until the result is dropped. A simulation's time stops while such a thread
    /// does not wait; other fabrics need not know.
    fn take_part(&self) -> Box<dyn Any + Send> {
        Box::new(())
    }
}
