//! Opens what an [`Address`] names: one way to connect, one way to receive.

use std::io;

use super::tcp::TcpListener;
use super::unix::UnixListener;
use super::{Address, AllowList, ChannelError, StreamChannel, StreamOptions, exec, file, tcp, unix};
use crate::sys::{Stop, take_inherited_fd};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The host's name has no address.
    #[error("no address found for host `{host}`: {source}; check the name or give the address")]
    Resolve {
        /// The name.
        host: String,
        /// The resolver's answer.
        source: io::Error,
    },
    /// A listener, a file, a descriptor or a command could not be opened.
    #[error("{address}: {doing}: {source}; {remedy}")]
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
    /// The connection failed, or the caller stopped.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// A stream that exists once was asked for again.
    #[error("{address} carries one stream only; give a tcp: or unix: address for more channels")]
    OnlyOne {
        /// The address.
        address: String,
    },
}

/// Opens the way to a destination: connects, starts the command or makes the file.
///
/// # Errors
/// [`OpenError`].
pub fn connect(address: &Address, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
    match address {
        Address::Tcp { host, port } => tcp::connect(host, *port, options, stop),
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
    address: Address,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix(UnixListener),
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
        let (kind, address) = match address {
            Address::Tcp { host, port } => {
                let listener = TcpListener::bind(host, *port, allow, stop)?;
                let local = listener.local();
                let address = Address::Tcp { host: local.ip().to_string(), port: local.port() };
                (Kind::Tcp(listener), address)
            }
            Address::Unix(path) => (Kind::Unix(UnixListener::bind(path)?), address.clone()),
            _ => (Kind::Once { opened: false }, address.clone()),
        };
        Ok(Self { kind, address })
    }

    /// Where it listens, with the port the kernel chose.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// What the operator should know before a guest comes this way.
    pub fn warning(&self) -> Option<String> {
        let Kind::Tcp(listener) = &self.kind else { return None };
        let local = listener.local().ip().to_canonical();
        let advice = "use a network you trust or a tunnel, and --allow CIDR to name who may connect";
        (!local.is_loopback())
            .then(|| format!("{}: guest RAM travels unencrypted and unauthenticated; {advice}", self.address))
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// [`OpenError`]; [`OpenError::OnlyOne`] at the second call where the address is one stream.
    pub fn accept(&mut self, options: &StreamOptions, stop: &Stop) -> Result<StreamChannel, OpenError> {
        match &mut self.kind {
            Kind::Tcp(listener) => listener.accept(options, stop),
            Kind::Unix(listener) => listener.accept(options, stop),
            Kind::Once { opened: true } => Err(OpenError::OnlyOne { address: self.address.to_string() }),
            Kind::Once { opened } => {
                *opened = true;
                self.open_once(options)
            }
        }
    }

    fn open_once(&self, options: &StreamOptions) -> Result<StreamChannel, OpenError> {
        match &self.address {
            Address::Fd(number) => inherited(*number, options),
            Address::Exec(command) => opened(&self.address, exec::read_from(command, options)),
            Address::File(path) => opened(&self.address, file::read_from(path, options)),
            Address::Tcp { .. } | Address::Unix(_) => {
                Err(OpenError::OnlyOne { address: self.address.to_string() })
            }
        }
    }
}
