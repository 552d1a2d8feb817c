//! Opens what an [`Address`] names: one way to connect, one way to receive.

mod address;
mod allow;
mod auto;
pub(crate) mod candidates;
mod obstacle;
mod retry;

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

pub use address::{Address, AddressError};
pub use allow::{AllowError, AllowList};
use auto::AutoListener;
pub(crate) use candidates::Listening;
use candidates::{Candidates, MAIN, MAIN_AND_PAGES};
pub use obstacle::{DECISION_TIMEOUT, Obstacle};

use crate::error::Remedy;
use crate::guest::GuestMemory;
use crate::stream::channel_count::ChannelMismatch;
use crate::stream::qemu::mapped_stream::MappedReadError;
use crate::stream::qemu::packed::Packing;
use crate::sys::{Stop, take_inherited_fd};
#[cfg(feature = "rdma")]
use crate::transport::rdma::{RdmaListener, connect_here as rdma_source};
use crate::transport::stream::{exec, file, tcp, tcp::TcpListener, unix, unix::UnixListener};
use crate::transport::{
    ChannelError, ChannelOptions, DeltaCacheSize, DestinationConnection, InlineLink, MultifdDestination,
    PageSending, SourceConnection, SourceLink, StreamChannel, StreamOptions, Way, mapped_ram, multifd,
};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The host's name has no address.
    #[error("no address found for host `{host}`; check the name or give the address")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's answer.
        source: io::Error,
    },
    /// A listener, a file, a descriptor or a command could not be opened.
    #[error("{address}: {doing} failed ({remedy})")]
    Open {
        /// What was to be opened.
        address: String,
        /// How.
        doing: &'static str,
        /// What can be done about it.
        remedy: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A mapped-ram file that is none, or not whole.
    #[error("{address} can't be read")]
    Unreadable {
        /// The address.
        address: String,
        /// Why, and where.
        source: MappedReadError,
    },
    /// The connection failed, or the caller stopped.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// RDMA can't be used on this host.
    #[error("{address}: RDMA can't be used here")]
    NoRdma {
        /// The address.
        address: String,
        /// Why not, and what would help.
        #[source]
        why: WhyNoRdma,
    },
    /// An `rdma:` address where only a byte stream will do.
    #[error("{address} is no byte stream; give a tcp: or unix: address here, or file:")]
    NotAStream {
        /// The address.
        address: String,
    },
    /// An `auto:` address that neither way reaches.
    #[error("{address}: {rdma}; and by TCP neither")]
    Neither {
        /// The address.
        address: String,
        /// What stood in RDMA's way.
        rdma: String,
        /// What stood in TCP's.
        #[source]
        tcp: Box<OpenError>,
    },
    /// The connections of a source with page channels did not come as they should.
    #[error("{address}: {what}; {}", Remedy::AlignChannels)]
    Channels {
        /// The address.
        address: String,
        /// What was found.
        what: String,
    },
    /// The source, a ramwire, has another number of page channels.
    #[error(transparent)]
    OtherChannels(#[from] ChannelMismatch),
    /// Deltas where pages do not go in the stream.
    #[error("{address}: only pages in the stream can travel as deltas; {}", Remedy::DropDeltasOrChannels)]
    NoDeltas {
        /// The address.
        address: String,
    },
    /// Compressed pages where each has a place of its size.
    #[error("{address}: pages that have places in a file are not compressed; leave the compression out")]
    Compressed {
        /// The address.
        address: String,
    },
    /// Page channels where there is one stream only.
    #[error("{address} has no page channels; {}", Remedy::DropChannels)]
    NoChannels {
        /// The address.
        address: String,
    },
    /// Pages that can't be sent in the way that was asked for.
    #[error("{address}: {sending} {why}; {remedy}")]
    NoSuchSending {
        /// The address.
        address: String,
        /// The way.
        sending: PageSending,
        /// Why not.
        why: &'static str,
        /// What would help.
        remedy: Remedy,
    },
    /// A stream that exists once was asked for again.
    #[error("{address} carries one stream only; give a tcp: or unix: address for more channels")]
    OnlyOne {
        /// The address.
        address: String,
    },
}

impl OpenError {
    /// What would help, where a setting does.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Open { remedy, .. } => Some(Remedy::Advice(remedy)),
            Self::Channel(error) => error.remedy(),
            Self::Channels { .. } => Some(Remedy::AlignChannels),
            Self::NoDeltas { .. } => Some(Remedy::DropDeltasOrChannels),
            Self::NoChannels { .. } => Some(Remedy::DropChannels),
            Self::NoSuchSending { remedy, .. } => Some(*remedy),
            Self::Neither { tcp, .. } => tcp.remedy(),
            _ => None,
        }
    }
}

/// Why RDMA can't be used on this host.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WhyNoRdma {
    /// The program was built without it.
    #[error("this ramwire was built without the `rdma` feature")]
    NotBuilt,
    /// No library, no device, or too little memory may be locked.
    #[error(transparent)]
    Unusable(Box<dyn std::error::Error + Send + Sync>),
    /// The memory behind a block may be given back or remapped while a NIC knows it.
    #[error("the memory of RAM block {block} does not promise to stay in place")]
    NotInPlace {
        /// The block.
        block: String,
    },
    /// The guest gives memory back, or may, while a NIC knows it.
    #[error(
        "the guest does not promise to keep its memory in place while a NIC knows it; take balloon and free page \
         reporting off it"
    )]
    GuestDiscards,
    /// There are devices, but none carries traffic.
    #[error("no RDMA device has an active port with an IP address ({devices}); `ramwire devices` says more")]
    NoActivePort {
        /// Names of the devices.
        devices: String,
    },
}

/// What is asked of an `rdma:` connection; of no effect on others.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RdmaOptions {
    /// Register all of RAM at both ends before the first page.
    pub pin_all: bool,
    /// Without `pin_all`: most bytes registered at a time; the longest unused are given back. `None`: all of RAM in the end.
    pub pin_budget: Option<u64>,
    /// Open a return path to a QEMU: 10.0 with its `return-path` capability set. A ramwire always has one.
    pub return_path: bool,
    /// Queue pairs for pages, 1 to 16; more than one only between two ramwires.
    pub queue_pairs: u16,
    /// At a destination: the source writes nothing between a round's end and what is read next. For a relay, which looks
    /// for the round's pages then. A QEMU always waits so.
    pub wait_after_round: bool,
    /// At a source: the guest can't promise to keep its memory in place (its `GuestControl::forbid_discard` says no). Then
    /// `rdma:` is refused, and `auto:` takes TCP.
    pub may_discard: bool,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self {
            pin_all: false,
            pin_budget: None,
            return_path: false,
            queue_pairs: 1,
            wait_after_round: false,
            may_discard: false,
        }
    }
}

/// How a connection is opened, at either end.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ConnectionOptions {
    /// Of every connection.
    pub stream: StreamOptions,
    /// Of `rdma:` connections.
    pub rdma: RdmaOptions,
    /// Page channels of `tcp:` and `unix:` connections.
    pub channels: ChannelOptions,
    /// Bytes of the cache for pages that travel as differences in the stream, at a source, to begin with; 0: none do.
    pub delta_cache: u64,
    /// How long a source tries again where nobody listens yet, by `tcp:`, `unix:`, `rdma:` and `auto:`; 0: it tries once.
    /// A connection that was taken is not tried again.
    pub retry: Duration,
}

impl ConnectionOptions {
    /// These of the connection, the defaults of the rest.
    pub fn of_stream(stream: StreamOptions) -> Self {
        Self { stream, ..Self::default() }
    }
}

/// Why RDMA was not taken where a caller may choose another way: what stood in its way, and the details.
pub fn why_no_rdma(error: &OpenError) -> String {
    obstacle::why(error)
}

/// Opens the best connection there is to `address` for the pages of `memory`.
///
/// # Errors
/// [`OpenError`].
pub fn open_source(
    address: &Address,
    memory: Arc<dyn GuestMemory>,
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    let channels = &options.channels;
    let in_stream = channels.count == 0 && !matches!(address, Address::Rdma { .. } | Address::Mapped { .. });
    if options.delta_cache > 0 && !in_stream {
        return Err(OpenError::NoDeltas { address: address.to_string() });
    }
    if let Some((why, remedy)) = channels.no_such_sending() {
        return Err(OpenError::NoSuchSending {
            address: address.to_string(),
            sending: channels.sending,
            why,
            remedy,
        });
    }
    retry::until_heard(address, options.retry, stop, || open_once(address, memory.clone(), options, stop))
}

fn open_once(
    address: &Address,
    memory: Arc<dyn GuestMemory>,
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    let channels = &options.channels;
    match address {
        Address::Rdma { .. } | Address::Fd(_) | Address::Exec(_) | Address::File(_) if channels.count > 0 => {
            Err(OpenError::NoChannels { address: address.to_string() })
        }
        Address::Rdma { .. } if options.rdma.may_discard => {
            Err(OpenError::NoRdma { address: address.to_string(), why: WhyNoRdma::GuestDiscards })
        }
        Address::Rdma { host, port } => {
            rdma_source(host, *port, memory, &options.stream, &options.rdma, stop)
        }
        Address::Mapped { path, offset } => {
            check_plain_pages(address, channels)?;
            let link = mapped_ram::create(path, *offset, memory, channels.count, &channels.spawn)?;
            Ok(SourceConnection::new(Box::new(link), None).by(Way::named(address)))
        }
        Address::Auto { host, port } => auto::open_source((host, *port), memory, options, stop),
        _ => open_stream(address, memory, options, Way::named(address), stop),
    }
}

/// In a file of places pages lie as they are.
fn check_plain_pages(address: &Address, channels: &ChannelOptions) -> Result<(), OpenError> {
    if channels.packing == Packing::Plain {
        return Ok(());
    }
    Err(OpenError::Compressed { address: address.to_string() })
}

/// Opens a byte stream, and page channels beside it where some are asked for.
pub(super) fn open_stream(
    address: &Address,
    memory: Arc<dyn GuestMemory>,
    options: &ConnectionOptions,
    way: Way,
    stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    let (sink, back) = connect(address, &options.stream, stop)?.with_return_path();
    let link: Box<dyn SourceLink> = match options.channels.count {
        0 => Box::new(
            InlineLink::new(Box::new(sink), memory).with_deltas(DeltaCacheSize::new(options.delta_cache)),
        ),
        _ => {
            let open = || connect(address, &options.stream, stop);
            Box::new(multifd::connect(Box::new(sink), memory, &options.channels, open)?)
        }
    };
    Ok(SourceConnection::new(link, back.map(|back| Box::new(back) as Box<_>)).by(way))
}

/// The address of the first RDMA device here that carries traffic, if this process may lock `bytes` of memory.
///
/// # Errors
/// [`WhyNoRdma`].
pub fn rdma_address(bytes: u64) -> Result<IpAddr, WhyNoRdma> {
    #[cfg(feature = "rdma")]
    return crate::transport::rdma::usable_address(bytes);
    #[cfg(not(feature = "rdma"))]
    {
        let _ = bytes;
        Err(WhyNoRdma::NotBuilt)
    }
}

#[cfg(not(feature = "rdma"))]
fn rdma_source(
    host: &str,
    port: u16,
    _memory: Arc<dyn GuestMemory>,
    _options: &StreamOptions,
    _rdma: &RdmaOptions,
    _stop: &Stop,
) -> Result<SourceConnection, OpenError> {
    Err(not_built(&Address::Rdma { host: host.to_owned(), port }))
}

#[cfg(not(feature = "rdma"))]
fn not_built(address: &Address) -> OpenError {
    OpenError::NoRdma { address: address.to_string(), why: WhyNoRdma::NotBuilt }
}

/// Opens the way to a destination: connects, starts the command or makes the file.
///
/// # Errors
/// [`OpenError`].
pub fn connect(address: &Address, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
    match address {
        Address::Tcp { host, port } => tcp::connect(host, *port, options, stop),
        Address::Rdma { .. } | Address::Auto { .. } | Address::Mapped { .. } => {
            Err(OpenError::NotAStream { address: address.to_string() })
        }
        Address::Unix(path) => unix::connect(path, options, stop),
        Address::Fd(number) => inherited(*number, options),
        Address::Exec(command) => opened(address, exec::write_to(command, options)),
        Address::File(path) => opened(address, file::write_to(path, options)),
    }
}

fn inherited(number: i32, options: &StreamOptions) -> Result<StreamChannel, OpenError> {
    let address = Address::Fd(number);
    let taken =
        take_inherited_fd(number).and_then(|fd| StreamChannel::from_fd(fd, address.to_string(), options));
    opened(&address, taken)
}

fn opened(address: &Address, channel: io::Result<StreamChannel>) -> Result<StreamChannel, OpenError> {
    let remedy = match address {
        Address::Fd(_) => "pass an open stream socket or pipe to the process and give its number",
        Address::Exec(_) => "the command needs a shell `sh` on the PATH",
        _ => "check that the path exists and may be opened",
    };
    channel.map_err(|source| OpenError::Open {
        address: address.to_string(),
        doing: "opening",
        remedy,
        source,
    })
}

/// The destination's side of an address: waits for connections, or opens what is there to be read.
///
/// Dropped once the migration has its channels, it closes to everybody else.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    /// Never empty.
    addresses: Vec<Address>,
    candidates: Candidates,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Auto(AutoListener),
    Unix(UnixListener),
    #[cfg(feature = "rdma")]
    Rdma(RdmaListener),
    /// One stream, opened by the first accept.
    Once {
        opened: bool,
    },
}

impl Listener {
    /// Listens. Of a TCP address without a host only this machine can connect; `allow` narrows who may.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn bind(address: &Address, allow: AllowList, stop: &Stop) -> Result<Self, OpenError> {
        let (kind, addresses) = match address {
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind(host, *port, allow, stop)?;
                let tcp = |local| Address::Tcp { host: tcp::host_of(local), port: local.port() };
                let addresses = listener.locals().map(tcp).collect();
                (Kind::Tcp(listener), addresses)
            }
            Address::Auto { host, port } => {
                let listener = AutoListener::bind(host, *port, allow, stop)?;
                let auto = |local| Address::Auto { host: tcp::host_of(local), port: local.port() };
                let addresses = listener.tcp().locals().map(auto).collect();
                (Kind::Auto(listener), addresses)
            }
            #[cfg(feature = "rdma")]
            Address::Rdma { host, port } => {
                let listener = RdmaListener::bind_here(host, *port, allow)?;
                let address = Address::Rdma { host: host.clone(), port: listener.port() };
                (Kind::Rdma(listener), vec![address])
            }
            #[cfg(not(feature = "rdma"))]
            Address::Rdma { .. } => return Err(not_built(address)),
            Address::Unix(path) => (Kind::Unix(UnixListener::bind(path)?), vec![address.clone()]),
            _ => (Kind::Once { opened: false }, vec![address.clone()]),
        };
        Ok(Self { kind, addresses, candidates: Candidates::default() })
    }

    /// Where it listens, with the port the kernel chose: the first of [`addresses`](Self::addresses).
    pub fn address(&self) -> &Address {
        &self.addresses[0]
    }

    /// All it listens on: a host's name may have several addresses. A source can be told any of them as it is written.
    pub fn addresses(&self) -> &[Address] {
        &self.addresses
    }

    /// What the operator should know before a guest comes this way.
    pub fn warning(&self) -> Option<String> {
        let only_here = match &self.kind {
            Kind::Tcp(listener) => listener.is_loopback(),
            Kind::Auto(listener) => listener.tcp().is_loopback(),
            // A device has no loopback: whoever reaches it comes from the network.
            #[cfg(feature = "rdma")]
            Kind::Rdma(_) => false,
            Kind::Unix(_) | Kind::Once { .. } => return None,
        };
        let address = self.address();
        (!only_here).then(|| {
            format!("{address}: guest RAM travels unencrypted and unauthenticated; {}", Remedy::AllowPeers)
        })
    }

    /// Has `tell` told of each connection that was closed because it does not begin as a migration does, up to a number;
    /// without it only the log has them.
    pub fn on_stranger(&mut self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.candidates.tell(Box::new(tell));
    }

    /// Why an `auto:` address is listened on by TCP only.
    pub fn why_no_rdma(&self) -> Option<&str> {
        match &self.kind {
            Kind::Auto(listener) => listener.why_not.as_deref(),
            _ => None,
        }
    }

    /// Waits for a source, whatever its connection is made of.
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn accept_connection(
        &mut self,
        options: &ConnectionOptions,
        stop: &Stop,
    ) -> Result<DestinationConnection, OpenError> {
        let channels = &options.channels;
        if let Address::Mapped { path, offset } = self.address() {
            check_plain_pages(self.address(), channels)?;
            let link = mapped_ram::open(path, *offset, channels.count, &channels.spawn)?;
            return Ok(DestinationConnection::new(Box::new(link), None).by(Way::named(self.address())));
        }
        let one_stream = !matches!(self.kind, Kind::Tcp(_) | Kind::Unix(_));
        if channels.count > 0 && one_stream {
            return Err(OpenError::NoChannels { address: self.address().to_string() });
        }
        #[cfg(feature = "rdma")]
        if let Kind::Rdma(listener) = &mut self.kind {
            return Ok(listener.accept(&options.stream, &options.rdma, stop)?);
        }
        if let Kind::Auto(listener) = &mut self.kind {
            return listener.accept(&mut self.candidates, &options.stream, &options.rdma, stop);
        }
        let way = Way::named(self.address());
        if channels.count == 0 {
            let main = self.accept_one_of((&MAIN, 1), &options.stream, stop)?;
            return Ok(DestinationConnection::over(main).by(way));
        }
        let address = self.address().to_string();
        let expected = usize::from(channels.count) + 1;
        let next = |stop: &Stop| self.accept_one_of((&MAIN_AND_PAGES, expected), &options.stream, stop);
        let (main, pages) = multifd::accept(channels.count, &address, &options.stream, stop, next)?;
        let (main, back) = main.with_return_path();
        let source = MultifdDestination::new(main, pages, channels.clone(), options.stream.stall);
        Ok(DestinationConnection::new(Box::new(source), back.map(|back| Box::new(back) as Box<_>)).by(way))
    }

    /// Waits for the next connection that begins with one of these words; others are closed.
    fn accept_one_of(
        &mut self,
        wanted: (&[u32], usize),
        options: &StreamOptions,
        stop: &Stop,
    ) -> Result<StreamChannel, OpenError> {
        let listening: &dyn Listening = match &self.kind {
            Kind::Tcp(listener) => listener,
            Kind::Unix(listener) => listener,
            // Opened by us, and by nobody else.
            _ => return self.accept(options, stop),
        };
        self.candidates.next(listening, wanted, options, stop)
    }

    /// Waits for the next connection that is a byte stream, whatever it says.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::OnlyOne`] at the second call where the address is one stream.
    pub fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        match &mut self.kind {
            Kind::Tcp(listener) => Ok(candidates::accept(listener, options, stop)?),
            Kind::Unix(listener) => Ok(candidates::accept(listener, options, stop)?),
            #[cfg(feature = "rdma")]
            Kind::Rdma(_) => Err(OpenError::NotAStream { address: self.address().to_string() }),
            Kind::Auto(_) => Err(OpenError::NotAStream { address: self.address().to_string() }),
            Kind::Once { opened: true } => Err(OpenError::OnlyOne { address: self.address().to_string() }),
            Kind::Once { opened } => {
                *opened = true;
                self.open_once(options)
            }
        }
    }

    fn open_once(&self, options: &StreamOptions) -> Result<StreamChannel, OpenError> {
        match self.address() {
            Address::Fd(number) => inherited(*number, options),
            Address::Exec(command) => opened(self.address(), exec::read_from(command, options)),
            Address::File(path) => opened(self.address(), file::read_from(path, options)),
            Address::Mapped { .. } => Err(OpenError::NotAStream { address: self.address().to_string() }),
            Address::Tcp { .. } | Address::Rdma { .. } | Address::Auto { .. } | Address::Unix(_) => {
                Err(OpenError::OnlyOne { address: self.address().to_string() })
            }
        }
    }
}
