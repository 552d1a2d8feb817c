//! Every kind of connection, for the suite.

use std::any::Any;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::stream::qemu::page_compression::PageCompression;
use crate::sys::Stop;
#[cfg(feature = "tls")]
use crate::transport::tls::tests::certificates::Authority;
use crate::transport::{
    Address, AllowList, ChannelOptions, ConnectionOptions, DestinationConnection, Listener, OpenError,
    SourceConnection, StreamChannel, StreamOptions, open_source,
};
#[cfg(feature = "tls")]
use crate::transport::{Tls, TlsOptions};

/// Keeps the surroundings of a connection alive while a thread works on it.
pub(in crate::transport) type Held = Box<dyn Any + Send>;
/// Makes one end, on the thread that works on it.
pub(in crate::transport) type Make<C> = Box<dyn FnOnce() -> Result<(C, Held), OpenError> + Send>;

/// Both ends of a connection to make.
pub(in crate::transport) struct Ends {
    pub(in crate::transport) source: Make<SourceConnection>,
    pub(in crate::transport) destination: Make<DestinationConnection>,
}

/// A kind of connection.
pub(super) struct Kind {
    pub(super) name: &'static str,
    /// The scheme whose links it has.
    pub(super) scheme: &'static str,
    /// Both ends exist at the same time. Otherwise the source's end finishes before the destination's is created.
    pub(super) both_at_once: bool,
    /// The destination sees each round; on other links a page has one offset, which holds its last content.
    pub(super) keeps_rounds: bool,
    /// How errors name the peer or one of its channels.
    pub(super) peer: &'static [&'static str],
    pub(super) make: fn(Arc<dyn GuestMemory>) -> Ends,
}

pub(super) const KINDS: &[Kind] = &[
    Kind {
        name: "tcp",
        scheme: "tcp",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| socket(m, "tcp:127.0.0.1:0", options(0)),
    },
    Kind {
        name: "tcp, page channels",
        scheme: "tcp",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| socket(m, "tcp:127.0.0.1:0", options(3)),
    },
    Kind {
        name: "tcp, compressed channels",
        scheme: "tcp",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| socket(m, "tcp:127.0.0.1:0", compressed()),
    },
    #[cfg(feature = "tls")]
    Kind {
        name: "tcp, TLS",
        scheme: "tcp",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| encrypted_socket(m, "tcp:127.0.0.1:0", options(0)),
    },
    #[cfg(feature = "tls")]
    Kind {
        name: "tcp, page channels, TLS",
        scheme: "tcp",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| encrypted_socket(m, "tcp:127.0.0.1:0", options(2)),
    },
    Kind {
        name: "unix",
        scheme: "unix",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["unix:"],
        make: |m| unix_socket(m, options(0)),
    },
    Kind {
        name: "unix, page channels",
        scheme: "unix",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["unix:"],
        make: |m| unix_socket(m, options(2)),
    },
    Kind {
        name: "auto",
        scheme: "auto",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| socket(m, "auto:127.0.0.1:0", options(0)),
    },
    #[cfg(feature = "tls")]
    Kind {
        name: "auto, TLS",
        scheme: "auto",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["tcp:"],
        make: |m| encrypted_socket(m, "auto:127.0.0.1:0", options(0)),
    },
    Kind {
        name: "fd",
        scheme: "fd",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["fd:"],
        make: descriptor,
    },
    Kind {
        name: "exec",
        scheme: "exec",
        both_at_once: false,
        keeps_rounds: true,
        peer: &["exec:"],
        make: |m| one_way(m, |path| format!("exec:cat > {path}"), |path| format!("exec:cat {path}")),
    },
    Kind {
        name: "file",
        scheme: "file",
        both_at_once: false,
        keeps_rounds: true,
        peer: &["file:"],
        make: |m| one_way(m, |path| format!("file:{path}"), |path| format!("file:{path}")),
    },
    Kind {
        name: "mapped",
        scheme: "mapped",
        both_at_once: false,
        keeps_rounds: false,
        peer: &["mapped:"],
        make: |m| one_way(m, |path| format!("mapped:{path}"), |path| format!("mapped:{path}")),
    },
    #[cfg(feature = "rdma")]
    Kind {
        name: "rdma",
        scheme: "rdma",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["rdma:"],
        make: |m| crate::transport::rdma::simulated(m, 1),
    },
    #[cfg(feature = "rdma")]
    Kind {
        name: "rdma, four queue pairs",
        scheme: "rdma",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["rdma:"],
        make: |m| crate::transport::rdma::simulated(m, 4),
    },
    #[cfg(all(feature = "rdma", feature = "tls"))]
    Kind {
        name: "rdma, three queue pairs, TLS",
        scheme: "rdma",
        both_at_once: true,
        keeps_rounds: true,
        peer: &["rdma:"],
        make: |m| crate::transport::rdma::simulated_with_tls(m, 3),
    },
];

fn options(channels: u8) -> ConnectionOptions {
    let channels = ChannelOptions { count: channels, ..ChannelOptions::default() };
    ConnectionOptions { channels, ..ConnectionOptions::default() }
}

fn compressed() -> ConnectionOptions {
    let mut options = options(2);
    options.channels.compression = PageCompression::Zstd(1);
    options
}

fn socket(memory: Arc<dyn GuestMemory>, address: &str, options: ConnectionOptions) -> Ends {
    let listener = Listener::bind(&address.parse().unwrap(), AllowList::default(), &Stop::never()).unwrap();
    let to = listener.address().clone();
    connection(memory, listener, to, options)
}

/// With certificates of an authority of its own.
#[cfg(feature = "tls")]
fn encrypted_socket(memory: Arc<dyn GuestMemory>, address: &str, options: ConnectionOptions) -> Ends {
    let dir = tempfile::tempdir().unwrap();
    let tls = TlsOptions::in_dir(Authority::new("the authority").folder(dir.path().join("tls")));
    let (source, destination) = (Tls::of_source(&tls).unwrap(), Tls::of_destination(&tls).unwrap());
    let at = address.parse::<Address>().unwrap().with_tls(destination);
    let listener = Listener::bind(&at, AllowList::default(), &Stop::never()).unwrap();
    let to = listener.address().clone().with_tls(source);
    connection(memory, listener, to, options)
}

fn connection(
    memory: Arc<dyn GuestMemory>,
    mut listener: Listener,
    to: Address,
    options: ConnectionOptions,
) -> Ends {
    let (stop, at_source) = (Stop::never(), options.clone());
    Ends {
        source: Box::new(move || Ok((open_source(&to, memory, &at_source, &Stop::never())?, Box::new(())))),
        destination: Box::new(move || Ok((listener.accept_connection(&options, &stop)?, Box::new(())))),
    }
}

fn unix_socket(memory: Arc<dyn GuestMemory>, options: ConnectionOptions) -> Ends {
    let dir = tempfile::tempdir().unwrap();
    let Ends { source, destination } =
        socket(memory, &format!("unix:{}", dir.path().join("socket").display()), options);
    let destination = move || Ok((destination()?.0, Box::new(dir) as Held));
    Ends { source, destination: Box::new(destination) }
}

/// Opens `fd:N`: N must have existed when the program began, so the test can't open it by its address.
fn descriptor(memory: Arc<dyn GuestMemory>) -> Ends {
    let channel = |socket: UnixStream, name| {
        StreamChannel::from_fd(socket.into(), name, &StreamOptions::default()).unwrap()
    };
    let (near, far) = UnixStream::pair().unwrap();
    let (near, far) = (channel(near, "fd:3"), channel(far, "fd:4"));
    Ends {
        source: Box::new(move || Ok((SourceConnection::over(near, memory), Box::new(())))),
        destination: Box::new(move || Ok((DestinationConnection::over(far), Box::new(())))),
    }
}

fn one_way(memory: Arc<dyn GuestMemory>, to: fn(&str) -> String, from: fn(&str) -> String) -> Ends {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("stream").display().to_string();
    let (to, from): (Address, Address) = (to(&path).parse().unwrap(), from(&path).parse().unwrap());
    let options = ConnectionOptions::default();
    Ends {
        source: Box::new(move || Ok((open_source(&to, memory, &options, &Stop::never())?, Box::new(())))),
        destination: Box::new(move || {
            let stop = Stop::never();
            let mut listener = Listener::bind(&from, AllowList::default(), &stop)?;
            let connection = listener.accept_connection(&ConnectionOptions::default(), &stop)?;
            Ok((connection, Box::new(dir)))
        }),
    }
}
