//! Bare loops over a TCP connection: what the kernel allows before any engine costs anything.
//!
//! | pattern | sends | receives |
//! |---------|-------|----------|
//! | direct | buffers of 1 MiB | straight into RAM |
//! | stream | 8-byte header and page, 512 pages a call | 256 KiB buffer, copied into place |
//! | packet | header and 512 KiB of pages a call | header, then straight into RAM |
//!
//! The stream pattern is that of pages inside the byte stream, the packet pattern that of page channels.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::time::Instant;

use ramwire::sys::{FdKind, HostSpan, Mapping, RecvPart, SendPart, recv_parts, send_parts};

use super::bed::{self, Bed};
use super::peer::{Peer, Role, own_cpu_seconds};
use super::{BenchError, Run};

const PAGE: usize = 4096;
const DIRECT_BUFFER: usize = 1 << 20;
const STREAM_HEADER: usize = 8;
const STREAM_PAGES: usize = 512;
/// Stays in the second-level cache between the kernel's copy into it and ours out of it.
const STREAM_BUFFER: usize = 256 << 10;
const PACKET_PAGES: usize = 128;
/// As large as the header of a page channel's packet: fixed fields and an offset a page.
const PACKET_HEADER: usize = 64 + 256 + PACKET_PAGES * 8;
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

impl Pattern {
    fn role(self) -> Role {
        match self {
            Self::Direct => Role::FloorDirect,
            Self::Stream => Role::FloorStream,
            Self::Packet => Role::FloorPacket,
        }
    }
}

/// Moves the bed's memory to another process by a bare loop.
///
/// # Errors
/// [`BenchError`].
pub fn run(pattern: Pattern, bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bed::whole(&mapping)?;
    let mapped = bed.populated().mapped(true);
    let peer = Peer::start(pattern.role(), &bed.destination(), bed.bytes(), mapped, 0)?;
    let mut socket = TcpStream::connect(("127.0.0.1", peer.port)).map_err(failed("connecting"))?;
    socket.set_nodelay(true).map_err(failed("connecting"))?;
    let (begun, cpu) = (Instant::now(), own_cpu_seconds());
    match pattern {
        Pattern::Direct => send_direct(&socket, memory),
        Pattern::Stream => send_framed(&socket, memory, STREAM_HEADER, 1, STREAM_PAGES),
        Pattern::Packet => send_framed(&socket, memory, PACKET_HEADER, PACKET_PAGES, PACKET_PAGES),
    }
    .map_err(failed("sending"))?;
    socket.shutdown(Shutdown::Write).map_err(failed("sending"))?;
    // The last page is in place when the other process says so.
    socket.read_exact(&mut [0]).map_err(failed("waiting for the end"))?;
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), own_cpu_seconds() - cpu);
    Ok(Run { seconds, cpu_seconds: Some(cpu + peer.finish()?.cpu_seconds), downtime_ms: None })
}

/// Copies the bed's memory inside this process.
///
/// # Errors
/// [`BenchError`].
pub fn copy(bed: &Bed) -> Result<Run, BenchError> {
    let mapping = bed::map(&bed.source(), bed.bytes(), bed.populated().mapped(false))?;
    let memory = bed::whole(&mapping)?;
    let mut target = vec![1u8; COPY_WINDOW.min(memory.len())];
    let (begun, cpu) = (Instant::now(), own_cpu_seconds());
    let mut at = 0;
    while let Some(part) =
        memory.part(at, target.len().min(memory.len() - at)).filter(|part| !part.is_empty())
    {
        at += part.copy_to(&mut target);
    }
    let (seconds, cpu) = (begun.elapsed().as_secs_f64(), own_cpu_seconds() - cpu);
    Ok(Run { seconds, cpu_seconds: Some(cpu), downtime_ms: None })
}

fn failed(doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the bare loop".into(), doing, source }
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

fn send_direct(socket: &TcpStream, memory: HostSpan<'_>) -> io::Result<()> {
    let mut at = 0;
    while let Some(part) =
        memory.part(at, DIRECT_BUFFER.min(memory.len() - at)).filter(|part| !part.is_empty())
    {
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
pub fn receive(pattern: Pattern, mut socket: TcpStream, mapping: &Mapping) -> Result<(), BenchError> {
    let memory = bed::whole(mapping)?;
    let received = match pattern {
        Pattern::Direct => receive_direct(&socket, memory, 0, memory.len()),
        Pattern::Stream => receive_stream(&mut socket, memory),
        Pattern::Packet => receive_packets(&mut socket, memory),
    };
    received.and_then(|()| socket.write_all(&[1])).map_err(failed("receiving"))
}

fn receive_direct(socket: &TcpStream, memory: HostSpan<'_>, from: usize, until: usize) -> io::Result<()> {
    let mut at = from;
    while at < until {
        let part = memory.part(at, DIRECT_BUFFER.min(until - at));
        let part = part.ok_or(io::ErrorKind::InvalidData)?;
        match recv_parts(socket.as_fd(), &mut [RecvPart::Guest(part)])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => at += count,
        }
    }
    Ok(())
}

fn receive_stream(socket: &mut TcpStream, memory: HostSpan<'_>) -> io::Result<()> {
    const FRAME: usize = STREAM_HEADER + PAGE;
    let mut buffer = vec![0; STREAM_BUFFER];
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

fn receive_packets(socket: &mut TcpStream, memory: HostSpan<'_>) -> io::Result<()> {
    let mut header = [0; PACKET_HEADER];
    let mut left = memory.len();
    while left > 0 {
        socket.read_exact(&mut header)?;
        let count = left.min(PACKET_PAGES * PAGE);
        let from = offset_of(&header);
        receive_direct(socket, memory, from, from.saturating_add(count))?;
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
    use crate::cli::bench::Populated;
    use crate::cli::bench::bed::Fill;
    use std::net::TcpListener;

    /// Figures of a loop that moves something else than the memory would be worth nothing.
    #[test]
    fn every_pattern_moves_the_memory_whole() {
        let base = tempfile::tempdir().unwrap();
        // No multiple of any buffer.
        let bed = Bed::make(base.path(), (5 << 20) + 3 * PAGE as u64, Fill::Random, Populated::Yes).unwrap();
        for pattern in [Pattern::Direct, Pattern::Stream, Pattern::Packet] {
            bed.clear_destination().unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (far, _) = listener.accept().unwrap();
            let target = bed::map(&bed.destination(), bed.bytes(), true).unwrap();
            let receiver = std::thread::spawn(move || receive(pattern, far, &target));
            let mapping = bed::map(&bed.source(), bed.bytes(), false).unwrap();
            let memory = bed::whole(&mapping).unwrap();
            match pattern {
                Pattern::Direct => send_direct(&near, memory),
                Pattern::Stream => send_framed(&near, memory, STREAM_HEADER, 1, STREAM_PAGES),
                Pattern::Packet => send_framed(&near, memory, PACKET_HEADER, PACKET_PAGES, PACKET_PAGES),
            }
            .unwrap();
            near.shutdown(Shutdown::Write).unwrap();
            receiver.join().unwrap().unwrap();
            assert_eq!(bed.difference().unwrap(), None, "{pattern:?}");
        }
        assert!(copy(&bed).unwrap().seconds > 0.0);
    }
}
