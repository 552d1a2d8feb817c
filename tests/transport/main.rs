//! Connections over real sockets, pipes, commands and files.
//!
//! - `ways`: bytes by each kind of address, and addresses that can't be opened.
//! - `patience`: an end waits for a slow peer, but not for a silent or dead one.
//! - `strays`: connections of strangers, before that of the source.
//! - `ends`: every wait ends by a cancel, a deadline, or the peer's end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../src/sys/blocked.rs"]
mod blocked;
mod ends;
mod patience;
mod strays;
mod ways;

use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ramwire::sys::{CancelToken, RecvPart, SendPart, Stop};
use ramwire::transport::{
    Address, AllowList, ByteSink, ByteSource, ChannelError, Listener, StreamChannel, StreamOptions, connect,
};

const SECOND: Duration = Duration::from_secs(1);
/// Far more than an ended wait takes, on a busy machine too, and less than [`stop`] waits.
const SOON: Duration = Duration::from_secs(10);

fn stop() -> Stop {
    Stop::on(&CancelToken::default()).within(30 * SECOND)
}

fn impatient(stall_ms: u64) -> StreamOptions {
    let mut options = StreamOptions::default();
    options.stall = Some(Duration::from_millis(stall_ms));
    options
}

fn address(text: &str) -> Address {
    text.parse().unwrap()
}

fn listen(text: &str) -> Listener {
    Listener::bind(&address(text), AllowList::default(), &stop()).unwrap()
}

/// Both ends of a connection to `text`, where one end listens.
fn pair(text: &str, options: &StreamOptions) -> (StreamChannel, StreamChannel) {
    let mut listener = listen(text);
    let near = connect(listener.address(), options, &stop()).unwrap();
    (near, listener.accept(options, &stop()).unwrap())
}

fn send(channel: &mut StreamChannel, bytes: &[u8]) -> Result<(), ChannelError> {
    channel.send(&[SendPart::Own(bytes)], &stop())
}

fn recv(channel: &mut StreamChannel, room: &mut [u8]) -> Result<usize, ChannelError> {
    channel.recv(&mut [RecvPart::Own(room)], &stop())
}

fn read_all(source: &mut impl ByteSource) -> Result<Vec<u8>, ChannelError> {
    let (mut got, mut room) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match source.recv(&mut [RecvPart::Own(&mut room)], &stop())? {
            0 => return Ok(got),
            count => got.extend(&room[..count]),
        }
    }
}

/// Bytes that repeat only after 251 bytes.
fn pattern(len: usize) -> Vec<u8> {
    let mut bytes = (0..251u8).collect::<Vec<_>>().repeat(len / 251 + 1);
    bytes.truncate(len);
    bytes
}

/// A connection with small kernel buffers, so that a slow reader has an effect.
fn slow_pair(text: &str, stall_ms: u64) -> (StreamChannel, StreamChannel) {
    let options = impatient(stall_ms);
    let (near, far): (OwnedFd, OwnedFd) = if text == "unix" {
        let (near, far) = UnixStream::pair().unwrap();
        socket2::SockRef::from(&near).set_send_buffer_size(64 << 10).unwrap();
        (near.into(), far.into())
    } else {
        tcp_sockets(Some(128 << 10), Some(128 << 10))
    };
    let take = |fd| StreamChannel::from_fd(fd, "the other end", &options).unwrap();
    (take(near), take(far))
}

/// Connected sockets with these buffer sizes for far's receives and near's sends.
fn tcp_sockets(receive: Option<usize>, send: Option<usize>) -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    if let Some(receive) = receive {
        socket2::SockRef::from(&listener).set_recv_buffer_size(receive).unwrap();
    }
    let near = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    if let Some(send) = send {
        socket2::SockRef::from(&near).set_send_buffer_size(send).unwrap();
    }
    let (far, _) = listener.accept().unwrap();
    (near.into(), far.into())
}

/// Makes a socket drop all packets: to the peer its host is gone.
fn cut_off(fd: &OwnedFd) {
    let drop_all = socket2::SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0);
    socket2::SockRef::from(fd).attach_filter(&[drop_all]).unwrap();
}

/// A listener that accepts no further connection, and the connections that fill its queue.
fn full_queue() -> (TcpListener, Vec<socket2::Socket>) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let local = socket.local_addr().unwrap();
    let fill = |_| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        socket.set_nonblocking(true).unwrap();
        let _ = socket.connect(&local);
        socket
    };
    (socket.into(), (0..4).map(fill).collect())
}
