//! Bare loops over a TCP connection: what the kernel allows before any engine costs anything.
//!
//! | pattern | sends | receives |
//! |---------|-------|----------|
//! | direct | buffers | straight into RAM |
//! | stream | 8-byte header and page, 512 pages a call | a buffer, copied into place |
//! | packet | header and a buffer of pages a call | header, then straight into RAM |
//!
//! The stream pattern is that of pages inside the byte stream, the packet pattern that of page channels. Each pattern
//! is tried with buffers from 64 KiB to 4 MiB, and the best one stands for it.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use ramwire::sys::{
    CancelToken, FdKind, HostSpan, Mapping, RecvPart, SendPart, recv_parts, send_parts, set_low_water,
};
use ramwire::transport::Address;
use socket2::{Domain, Socket, Type};

use super::bed::{self, Bed};
use super::cost::Cost;
use super::own::Way;
use super::peer::{Peer, Role};
use super::{BenchError, Run};

const PAGE: usize = 4096;
const STREAM_HEADER: usize = 8;
const STREAM_PAGES: usize = 512;
/// Bytes that a receiver wants to be woken for.
const LOW_WATER: usize = 256 << 10;
/// Buffers that are tried.
const BUFFERS: [usize; 7] = [64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20];
/// Window of the copy loop, far beyond any cache.
const COPY_WINDOW: usize = 256 << 20;

/// How a loop sends and receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Big buffers.
    Direct,
    /// Headers and pages, mixed.
    Stream,
    /// A header, then many pages.
    Packet,
}

/// A bare loop with a buffer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Floor {
    /// How it sends and receives.
    pub pattern: Pattern,
    /// Bytes of a packet, of the receive buffer, or of each call.
    pub buffer: usize,
}

impl Floor {
    /// With a buffer of 256 KiB.
    pub fn new(pattern: Pattern) -> Self {
        Self { pattern, buffer: 256 << 10 }
    }

    /// `64K` to `4M`.
    pub fn buffer_name(self) -> String {
        match self.buffer >> 20 {
            0 => format!("{}K", self.buffer >> 10),
            megabytes => format!("{megabytes}M"),
        }
    }

    fn role(self) -> Role {
        match self.pattern {
            Pattern::Direct => Role::FloorDirect,
            Pattern::Stream => Role::FloorStream,
            Pattern::Packet => Role::FloorPacket,
        }
    }

    fn pages(self) -> usize {
        self.buffer / PAGE
    }

    /// As large as the header of a page channel's packet: fixed fields and an offset a page.
    fn packet_header(self) -> usize {
        64 + 256 + self.pages() * 8
    }

    fn send(self, socket: &TcpStream, memory: HostSpan<'_>) -> io::Result<()> {
        match self.pattern {
            Pattern::Direct => send_direct(socket, memory, self.buffer),
            Pattern::Stream => send_framed(socket, memory, STREAM_HEADER, 1, STREAM_PAGES),
            // The kernel takes 1024 parts a call.
            Pattern::Packet => send_framed(socket, memory, self.packet_header(), self.pages(), self.pages()),
        }
    }
}

/// The loop of `pattern` with its best buffer, by one run each.
///
/// # Errors
/// [`BenchError`].
pub fn best(pattern: Pattern, bed: &Bed, cancel: &CancelToken) -> Result<Floor, BenchError> {
    let mut best: Option<(f64, Floor)> = None;
    for buffer in BUFFERS {
        if cancel.is_cancelled() {
            return Err(BenchError::Cancelled);
        }
        bed.renew()?;
        let floor = Floor { pattern, buffer };
        let seconds = run(floor, bed)?.seconds;
        tracing::info!(?pattern, buffer = %floor.buffer_name(), seconds, "tried");
        if best.is_none_or(|(least, _)| seconds < least) {
            best = Some((seconds, floor));
        }
    }
    Ok(best.map_or_else(|| Floor::new(pattern), |(_, floor)| floor))
}

/// Moves the bed's memory to another process by a bare loop.
///
/// # Errors
/// [`BenchError`].
pub fn run(floor: Floor, bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bed::whole(&mapping)?;
    let peer = Peer::start(floor.role(), bed, Way::default(), Some(floor.buffer))?;
    let Address::Tcp { host, port } = &peer.address else {
        return Err(failed("connecting")(io::Error::other("it listens elsewhere")));
    };
    let mut socket = connect(host, *port).map_err(failed("connecting"))?;
    let (begun, before) = (Instant::now(), cost()?);
    floor.send(&socket, memory).map_err(failed("sending"))?;
    socket.shutdown(Shutdown::Write).map_err(failed("sending"))?;
    // The last page is in place when the other process says so.
    socket.read_exact(&mut [0]).map_err(failed("waiting for the end"))?;
    let (seconds, source) = (begun.elapsed().as_secs_f64(), Some(cost()?.since(before)));
    Ok(Run { seconds, source, destination: Some(peer.finish()?), ..Run::default() })
}

fn cost() -> Result<Cost, BenchError> {
    Cost::own().map_err(failed("counting its cost"))
}

/// Reads the bed's memory in this process.
///
/// # Errors
/// [`BenchError`].
pub fn sweep(bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bed::whole(&mapping)?;
    let (begun, before) = (Instant::now(), cost()?);
    std::hint::black_box(ramwire::sys::sweep(memory));
    let (seconds, source) = (begun.elapsed().as_secs_f64(), Some(cost()?.since(before)));
    Ok(Run { seconds, source, ..Run::default() })
}

/// Copies the bed's memory inside this process.
///
/// # Errors
/// [`BenchError`].
pub fn copy(bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bed::whole(&mapping)?;
    let mut target = vec![1u8; COPY_WINDOW.min(memory.len())];
    let (begun, before) = (Instant::now(), cost()?);
    let mut at = 0;
    while let Some(part) =
        memory.part(at, target.len().min(memory.len() - at)).filter(|part| !part.is_empty())
    {
        at += part.copy_to(&mut target);
    }
    let (seconds, source) = (begun.elapsed().as_secs_f64(), Some(cost()?.since(before)));
    Ok(Run { seconds, source, ..Run::default() })
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the bare loop".into(), doing, source }
}

/// A connection as ramwire makes it within a host: not paced from its beginning on.
fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::new(host.parse().map_err(io::Error::other)?, port);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_tcp_congestion(b"reno")?;
    socket.set_tcp_nodelay(true)?;
    socket.connect(&address.into())?;
    Ok(socket.into())
}

fn send_all(socket: &TcpStream, parts: &[SendPart<'_>]) -> io::Result<()> {
    let (mut first, mut skip) = (0, 0);
    while first < parts.len() {
        skip += send_parts(socket.as_fd(), FdKind::Socket, &parts[first..], skip)?;
        while parts.get(first).is_some_and(|part| skip >= part.len()) {
            skip -= parts[first].len();
            first += 1;
        }
    }
    Ok(())
}

fn send_direct(socket: &TcpStream, memory: HostSpan<'_>, buffer: usize) -> io::Result<()> {
    let mut at = 0;
    while let Some(part) = memory.part(at, buffer.min(memory.len() - at)).filter(|part| !part.is_empty()) {
        send_all(socket, &[SendPart::Guest(part)])?;
        at += part.len();
    }
    Ok(())
}

/// A header of `header` bytes that starts with the first page's offset, before every `pages` pages;
/// `a_call` pages go in one call.
fn send_framed(
    socket: &TcpStream,
    memory: HostSpan<'_>,
    header: usize,
    pages: usize,
    a_call: usize,
) -> io::Result<()> {
    let mut headers = vec![0u8; header * a_call.div_ceil(pages)];
    let total = memory.len() / PAGE;
    for call in (0..total).step_by(a_call) {
        let last = total.min(call + a_call);
        for (slot, page) in headers.chunks_mut(header).zip((call..last).step_by(pages)) {
            slot[..8].copy_from_slice(&((page * PAGE) as u64).to_be_bytes());
        }
        let mut parts = Vec::with_capacity(2 * a_call);
        for page in call..last {
            let within = page - call;
            if within % pages == 0 {
                parts.push(SendPart::Own(&headers[within / pages * header..][..header]));
            }
            parts.extend(memory.part(page * PAGE, PAGE).map(SendPart::Guest));
        }
        send_all(socket, &parts)?;
    }
    Ok(())
}

/// The receiving side, in the other process.
///
/// # Errors
/// [`BenchError`].
pub fn receive(floor: Floor, mut socket: TcpStream, mapping: &Mapping) -> Result<(), BenchError> {
    let memory = bed::whole(mapping)?;
    // As ramwire waits: for much. What is asked for and the end of the stream bound it.
    set_low_water(socket.as_fd(), LOW_WATER).map_err(failed("receiving"))?;
    let received = match floor.pattern {
        Pattern::Direct => receive_direct(&socket, memory, 0, memory.len(), floor.buffer),
        Pattern::Stream => receive_stream(&mut socket, memory, floor.buffer),
        Pattern::Packet => receive_packets(&mut socket, memory, floor),
    };
    received.and_then(|()| socket.write_all(&[1])).map_err(failed("receiving"))
}

fn receive_direct(
    socket: &TcpStream,
    memory: HostSpan<'_>,
    from: usize,
    until: usize,
    buffer: usize,
) -> io::Result<()> {
    let mut at = from;
    while at < until {
        let part = memory.part(at, buffer.min(until - at));
        let part = part.ok_or(io::ErrorKind::InvalidData)?;
        match recv_parts(socket.as_fd(), &mut [RecvPart::Guest(part)])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => at += count,
        }
    }
    Ok(())
}

fn receive_stream(socket: &mut TcpStream, memory: HostSpan<'_>, buffer: usize) -> io::Result<()> {
    const FRAME: usize = STREAM_HEADER + PAGE;
    let mut buffer = vec![0; buffer.max(2 * FRAME)];
    let mut filled = 0;
    loop {
        match socket.read(&mut buffer[filled..])? {
            0 if filled == 0 => return Ok(()),
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
        let whole = filled / FRAME * FRAME;
        for frame in buffer[..whole].chunks(FRAME) {
            let place = memory.part(offset_of(frame), PAGE).ok_or(io::ErrorKind::InvalidData)?;
            place.copy_from(&frame[STREAM_HEADER..]);
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

fn receive_packets(socket: &mut TcpStream, memory: HostSpan<'_>, floor: Floor) -> io::Result<()> {
    let mut header = vec![0; floor.packet_header()];
    let mut left = memory.len();
    while left > 0 {
        socket.read_exact(&mut header)?;
        let count = left.min(floor.buffer);
        let from = offset_of(&header);
        receive_direct(socket, memory, from, from.saturating_add(count), floor.buffer)?;
        left -= count;
    }
    Ok(())
}

fn offset_of(header: &[u8]) -> usize {
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[..8]);
    usize::try_from(u64::from_be_bytes(offset)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::bench::bed::Fill;
    use crate::cli::bench::{Memory, Populated};
    use std::net::TcpListener;

    /// Figures of a loop that moves something else than the memory would be worth nothing.
    #[test]
    fn every_pattern_moves_the_memory_whole() {
        let base = tempfile::tempdir().unwrap();
        // No multiple of any buffer.
        let bed =
            Bed::make(base.path(), (5 << 20) + 3 * PAGE as u64, Fill::Random, Populated::Yes, Memory::Shared)
                .unwrap();
        let patterns = [Pattern::Direct, Pattern::Stream, Pattern::Packet];
        for (pattern, buffer) in patterns.iter().flat_map(|pattern| BUFFERS.map(|buffer| (*pattern, buffer)))
        {
            let floor = Floor { pattern, buffer };
            bed.clear_destination().unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            let target = bed::map(&bed.destination(), bed.bytes(), true).unwrap();
            let receiver = std::thread::spawn(move || receive(floor, far, &target));
            let mapping = bed::map(&bed.source(), bed.bytes(), false).unwrap();
            floor.send(&near, bed::whole(&mapping).unwrap()).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            receiver.join().unwrap().unwrap();
            assert_eq!(bed.difference().unwrap(), None, "{floor:?}");
        }
        assert!(copy(&bed).unwrap().seconds > 0.0 && sweep(&bed).unwrap().seconds > 0.0);
    }
}
