//! A descriptor that this program was started with (`fd:`): an open stream, or at a destination a listening socket, as
//! a service manager hands it over.

use std::io;

use socket2::{SockRef, Socket, Type};

use super::opened;
use super::tcp::{TcpListener, host_of};
use super::unix::UnixListener;
use crate::sys::{duplicate, take_inherited_fd};
use crate::transport::open::{
    Endpoint, Listening, OneStream, Scheme, SchemeAbilities, Sockets, TlsCover, open_stream, parse_descriptor,
};
use crate::transport::{Address, AllowList, OpenError, StreamChannel, StreamOptions};

pub(in crate::transport) static SCHEME: Scheme = Scheme {
    name: "fd",
    form: "fd:N",
    hint: "fd:N with the descriptor's number",
    parse: parse_descriptor,
    abilities: SchemeAbilities {
        page_channels: false,
        pages_in_stream: true,
        answers: true,
        tls: TlsCover::Nothing,
        decides_late: false,
    },
    open: open_stream,
    connect: |address, options, _| take(address, options),
    listen: |address, allow, _| listen(address, allow),
};

const HAND_OVER: &str = "pass an open stream socket or pipe to the process and give its number";

fn take(address: &Address, options: &StreamOptions) -> Result<StreamChannel, OpenError> {
    let taken = take_inherited_fd(address.descriptor())
        .and_then(|fd| StreamChannel::from_fd(fd, address.to_string(), options));
    opened(address, HAND_OVER, taken)
}

/// A listening socket takes connections as one that was made here, with page channels and TLS; any other descriptor is
/// one stream.
fn listen(address: &Address, allow: AllowList) -> Result<Box<dyn Endpoint>, OpenError> {
    if is_listening(address.descriptor()) {
        return listening(address, allow).map_err(|source| OpenError::Open {
            address: address.to_string(),
            doing: "listening",
            remedy: "hand over a listening stream socket of TCP, or of UNIX with a path",
            source,
        });
    }
    match address.tls() {
        Some(_) => Err(OpenError::NoTls { address: address.to_string() }),
        None => Ok(OneStream::at(address, take)),
    }
}

/// Without taking it. A number that is not open is reported when it is taken.
fn is_listening(number: i32) -> bool {
    duplicate(&number).is_ok_and(|copy| SockRef::from(&copy).is_listener().unwrap_or(false))
}

fn listening(address: &Address, allow: AllowList) -> io::Result<Box<dyn Endpoint>> {
    let socket = Socket::from(take_inherited_fd(address.descriptor())?);
    let local = socket.local_addr()?;
    if socket.r#type()? != Type::STREAM {
        return Err(io::Error::other("it is no stream socket"));
    }
    socket.set_nonblocking(true)?;
    if let Some(local) = local.as_socket() {
        let listening = TcpListener::handed_over(socket, local, allow);
        let open_to_network = !listening.is_loopback();
        return Ok(endpoint(listening, Address::tcp(host_of(local), local.port()), open_to_network, address));
    }
    let path = local.as_pathname().ok_or_else(|| io::Error::other("it has no path"))?;
    let here = Address::unix(path);
    Ok(endpoint(UnixListener::handed_over(socket, path), here, false, address))
}

/// `here`: where a source connects.
fn endpoint<L>(listening: L, here: Address, open_to_network: bool, address: &Address) -> Box<dyn Endpoint>
where
    L: Listening + std::fmt::Debug + Send + 'static,
{
    let addresses = vec![here.with_tls_of(address)];
    Box::new(Sockets { listening, addresses, open_to_network, tls: address.tls().cloned() })
}
