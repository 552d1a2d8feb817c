//! Bare loops over a TCP connection: the limit that the kernel sets, without the cost of an engine.
//!
//! | pattern | sends | receives |
//! |---------|-------|----------|
//! | direct | buffers | straight into RAM |
//! | stream | 8-byte header and page, 512 pages a call | a buffer, copied into place |
//! | packet | header and a buffer of pages a call | header, then straight into RAM |
//!
//! The stream pattern is that of pages inside the byte stream, the packet pattern that of page channels. Each pattern
//! is tried with buffers from 64 KiB to 4 MiB, and the best one counts.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use ramwire::sys::{CancelToken, Mapping};
use socket2::{Domain, Socket, Type};

use super::Run;
use super::bed::{self, Bed};
use super::cost::Cost;
use super::kernel::{bytes, bytes_mut, set_low_water};
use super::own::Way;
use super::peer::{Peer, Role};
use crate::BenchError;

const PAGE: usize = 4096;
const STREAM_HEADER: usize = 8;
const STREAM_PAGES: usize = 512;
/// Bytes for which a receiver is woken.
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

    /// As large as the header of a page channel's packet: fixed fields and one offset per page.
    fn packet_header(self) -> usize {
        64 + 256 + self.pages() * 8
    }

    fn send(self, socket: &mut TcpStream, memory: &[u8]) -> io::Result<()> {
        match self.pattern {
            Pattern::Direct => send_direct(socket, memory, self.buffer),
            Pattern::Stream => send_framed(socket, memory, STREAM_HEADER, 1, STREAM_PAGES),
            // The kernel accepts 1024 parts per call.
            Pattern::Packet => send_framed(socket, memory, self.packet_header(), self.pages(), self.pages()),
        }
    }
}

/// The loop of `pattern` with its best buffer, found by one run for each.
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

/// Sends the bed's memory to another process by a bare loop.
///
/// # Errors
/// [`BenchError`].
pub fn run(floor: Floor, bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bytes(&mapping);
    let peer = Peer::start(floor.role(), bed, Way::default(), Some(floor.buffer))?;
    let Some((host, port)) = peer.address.host_and_port() else {
        return Err(failed("connecting")(io::Error::other("it listens elsewhere")));
    };
    let mut socket = connect(host, port).map_err(failed("connecting"))?;
    let (begun, before) = (Instant::now(), cost()?);
    floor.send(&mut socket, memory).map_err(failed("sending"))?;
    socket.shutdown(Shutdown::Write).map_err(failed("sending"))?;
    // The last page is in place when the other process reports it.
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
    let memory = bytes(&mapping);
    let (begun, before) = (Instant::now(), cost()?);
    std::hint::black_box(read_lines(std::hint::black_box(memory)));
    let (seconds, source) = (begun.elapsed().as_secs_f64(), Some(cost()?.since(before)));
    Ok(Run { seconds, source, ..Run::default() })
}

/// Copies the bed's memory inside this process.
///
/// # Errors
/// [`BenchError`].
pub fn copy(bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bytes(&mapping);
    let mut target = vec![1u8; COPY_WINDOW.min(memory.len())];
    let (begun, before) = (Instant::now(), cost()?);
    for part in memory.chunks(COPY_WINDOW) {
        target[..part.len()].copy_from_slice(part);
        std::hint::black_box(&mut target);
    }
    let (seconds, source) = (begun.elapsed().as_secs_f64(), Some(cost()?.since(before)));
    Ok(Run { seconds, source, ..Run::default() })
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the bare loop".into(), doing, source }
}

/// A connection as ramwire makes it within a host: without pacing from its beginning on.
fn connect(host: &str, port: u16) -> io::Result<TcpStream> {
    let address = SocketAddr::new(host.parse().map_err(io::Error::other)?, port);
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_tcp_congestion(b"reno")?;
    socket.set_tcp_nodelay(true)?;
    socket.connect(&address.into())?;
    Ok(socket.into())
}

/// One word of every 64 bytes: the minimum cost of reading memory.
fn read_lines(memory: &[u8]) -> u64 {
    let words = memory.chunks_exact(64).filter_map(|line| line.first_chunk());
    words.fold(0, |all, word| all | u64::from_ne_bytes(*word))
}

fn send_all(socket: &mut TcpStream, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !parts.is_empty() {
        let sent = socket.write_vectored(parts)?;
        IoSlice::advance_slices(&mut parts, sent);
    }
    Ok(())
}

fn send_direct(socket: &mut TcpStream, memory: &[u8], buffer: usize) -> io::Result<()> {
    memory.chunks(buffer).try_for_each(|part| socket.write_all(part))
}

/// Sends a header of `header` bytes that starts with the first page's offset, before every `pages` pages; `a_call`
/// pages go in one call.
fn send_framed(
    socket: &mut TcpStream,
    memory: &[u8],
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
                parts.push(IoSlice::new(&headers[within / pages * header..][..header]));
            }
            parts.push(IoSlice::new(&memory[page * PAGE..][..PAGE]));
        }
        send_all(socket, &mut parts)?;
    }
    Ok(())
}

/// The receiving side, in the other process.
///
/// # Errors
/// [`BenchError`].
pub fn receive(floor: Floor, mut socket: TcpStream, mapping: &mut Mapping) -> Result<(), BenchError> {
    let memory = bytes_mut(mapping);
    // Like ramwire it waits for many bytes. The requested length and the end of the stream limit the wait.
    set_low_water(socket.as_fd(), LOW_WATER).map_err(failed("receiving"))?;
    let received = match floor.pattern {
        Pattern::Direct => receive_direct(&mut socket, memory, floor.buffer),
        Pattern::Stream => receive_stream(&mut socket, memory, floor.buffer),
        Pattern::Packet => receive_packets(&mut socket, memory, floor),
    };
    received.and_then(|()| socket.write_all(&[1])).map_err(failed("receiving"))
}

/// Fills `memory`, with at most `buffer` bytes per call.
fn receive_direct(socket: &mut TcpStream, memory: &mut [u8], buffer: usize) -> io::Result<()> {
    let mut at = 0;
    while at < memory.len() {
        let most = buffer.min(memory.len() - at);
        match socket.read(&mut memory[at..at + most])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => at += count,
        }
    }
    Ok(())
}

fn receive_stream(socket: &mut TcpStream, memory: &mut [u8], buffer: usize) -> io::Result<()> {
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
            let (header, page) = frame.split_at(STREAM_HEADER);
            part(memory, offset_of(header), PAGE)?.copy_from_slice(page);
        }
        buffer.copy_within(whole..filled, 0);
        filled -= whole;
    }
}

fn receive_packets(socket: &mut TcpStream, memory: &mut [u8], floor: Floor) -> io::Result<()> {
    let mut header = vec![0; floor.packet_header()];
    let mut left = memory.len();
    while left > 0 {
        socket.read_exact(&mut header)?;
        let count = left.min(floor.buffer);
        receive_direct(socket, part(memory, offset_of(&header), count)?, floor.buffer)?;
        left -= count;
    }
    Ok(())
}

/// `len` bytes of the memory from `at` on.
fn part(memory: &mut [u8], at: usize, len: usize) -> io::Result<&mut [u8]> {
    let end = at.checked_add(len).ok_or(io::ErrorKind::InvalidData)?;
    memory.get_mut(at..end).ok_or_else(|| io::ErrorKind::InvalidData.into())
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
    use crate::migrate::bed::Fill;
    use crate::migrate::{Memory, Populated};
    use std::net::TcpListener;

    /// Figures of a loop that does not move exactly the memory would be worthless.
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
            let mut near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            let mut target = bed::map(&bed.destination(), bed.bytes(), true).unwrap();
            let receiver = std::thread::spawn(move || receive(floor, far, &mut target));
            let mapping = bed::map(&bed.source(), bed.bytes(), false).unwrap();
            floor.send(&mut near, bytes(&mapping)).unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            receiver.join().unwrap().unwrap();
            assert_eq!(bed.difference().unwrap(), None, "{floor:?}");
        }
        assert!(copy(&bed).unwrap().seconds > 0.0 && sweep(&bed).unwrap().seconds > 0.0);
    }
}
