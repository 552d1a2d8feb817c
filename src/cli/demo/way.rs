//! How the demo's guest is moved: the choice, and the connection to the process at the other end.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use ramwire::guest::MappedGuest;
use ramwire::sys::Stop;
use ramwire::transport::{
    Address, ConnectionOptions, DECISION_TIMEOUT, OpenError, SourceConnection, open_source, rdma_address,
    why_no_rdma,
};
use ramwire::units::Rate;

use super::blocks::BlockSpec;
use super::destination::Process;
use super::scratch::{self, Scratch};
use super::{Args, Failure};
use crate::cli::common::local_options;
use crate::cli::remedies::in_words;
use crate::cli::slow_link::SlowLink;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Transport {
    /// RDMA if both ends have it, else TCP over the loopback, which is faster than a UNIX socket
    Auto,
    /// The first RDMA device of this host
    Rdma,
    /// A TCP connection over the loopback
    Tcp,
    /// A UNIX socket
    Unix,
}

/// Why a local peer is reached by TCP: measured (docs/performance.md).
const FASTER: &str = "TCP over the loopback is faster than a UNIX socket";

/// The way that was taken, and the process at its end.
pub(super) struct Way {
    pub(super) transport: &'static str,
    pub(super) why: String,
    pub(super) destination: Process,
    /// The address of the destination.
    pub(super) address: Address,
    /// Where the migration goes on if the RDMA device fails.
    pub(super) fallback: Option<Address>,
    _link: Option<SlowLink>,
    _scratch: Option<Scratch>,
}

impl Way {
    /// Takes the way that `--transport` names; `auto` tries RDMA and reports why it was not used.
    pub(super) fn open(
        args: &Args,
        blocks: &[BlockSpec],
        memory: &Arc<MappedGuest>,
        postcopy: bool,
        stop: &Stop,
    ) -> Result<(Self, SourceConnection), Failure> {
        let open = |transport, address: &Address, why, within: Option<Duration>| -> Result<_, Failure> {
            let scratch = address.path().map(Scratch::of);
            let mut destination = Process::start(address, args, blocks, postcopy)?;
            let (address, link) = through_link(destination.address()?, args.link_rate)?;
            let fallback = match address.scheme() {
                "rdma" => Some(args.tls.of_source(destination.address()?)?),
                _ => None,
            };
            let address = args.tls.of_source(address)?;
            let mut options = ConnectionOptions::default();
            options.stream = local_options();
            options.rdma = args.rdma.options();
            options.rdma.postcopy = postcopy;
            options.channels = args.channels.options()?;
            options.delta_cache = args.limits.delta_cache();
            let memory = Arc::clone(memory);
            let stop = within.map_or_else(|| stop.clone(), |within| stop.within(within));
            let connection = open_source(&address, memory, &options, &stop)?;
            let way = Self { transport, why, destination, address, fallback, _link: link, _scratch: scratch };
            Ok((way, connection))
        };
        let rdma = |why: &str, within| {
            // Both ends lock their own copy, each in a process of its own.
            let bytes = blocks.iter().map(BlockSpec::length).sum();
            let bytes = args.rdma.options().pin_budget.map_or(bytes, |budget| budget.min(bytes));
            let no = |why| OpenError::NoRdma { address: "--transport rdma".into(), why };
            let address = Address::rdma(rdma_address(bytes).map_err(no)?.to_string(), 0);
            open("rdma", &address, why.to_owned(), within)
        };
        let unix = |why| open("unix", &Address::unix(scratch::socket_path()?), why, None);
        let tcp = |why| open("tcp", &Address::tcp("127.0.0.1", 0), why, None);
        match args.transport {
            _ if args.same_host => unix("memory is passed over a UNIX socket (--same-host)".into()),
            Transport::Rdma => rdma("--transport rdma", None),
            Transport::Tcp => tcp("--transport tcp".into()),
            Transport::Unix => unix("--transport unix".into()),
            Transport::Auto if args.limits.delta_cache() > 0 => {
                tcp(format!("deltas (--xbzrle-cache-size) need a byte stream, and {FASTER}"))
            }
            Transport::Auto if args.cut > 0 && !postcopy => {
                tcp(format!("a connection that is cut (--cut) and replaced is a byte stream, and {FASTER}"))
            }
            Transport::Auto if postcopy => tcp(format!(
                "a switch to postcopy (--postcopy, --timeout-action) needs a byte stream, and {FASTER}"
            )),
            Transport::Auto if args.channels.count() > 0 => {
                tcp(format!("page channels (--channels) need a byte stream, and {FASTER}"))
            }
            Transport::Auto if args.tls.is_given() => {
                tcp(format!("TLS (--tls-dir) encrypts pages on a byte stream only, and {FASTER}"))
            }
            Transport::Auto => {
                let tried = rdma("both ends have a working RDMA device", Some(DECISION_TIMEOUT));
                tried.or_else(|error| {
                    let why = error.downcast_ref().map_or_else(|| in_words(&*error), why_no_rdma);
                    tcp(format!("both ends are on this host, where {FASTER}, and {why}"))
                })
            }
        }
    }
}

/// The address at which `address` is reached through a link of `rate` bytes a second, and the link; 0: as it is.
fn through_link(address: Address, rate: u64) -> Result<(Address, Option<SlowLink>), Failure> {
    let Some((host, port)) = address.host_and_port().filter(|_| rate > 0) else {
        return Ok((address, None));
    };
    let link = SlowLink::to((host.parse::<IpAddr>()?, port).into(), Rate(rate))?;
    let entered = link.address();
    Ok((Address::tcp(entered.ip().to_string(), entered.port()), Some(link)))
}
