//! Guest pages that are sent to a socket by reference ([`PagePipe`]): no copy is made for its queue.
//!
//! The queue refers to the guest's own pages. The bytes sent are those at the time of transmission or, on one host, of
//! the peer's read. The guest may write the pages meanwhile: the bytes are then newer, or a mix of old and new. Such a
//! write marks the page dirty, since its bit was cleared before the batch was made. So the page is sent again after
//! this copy: on the same channel it follows in the stream, on another it waits after the barrier. In the last round
//! the guest does not write. Bytes that must agree with others are not sent by reference: headers and compressed pages
//! are copied, and page channels have no deltas.
//!
//! There are no receipts. The queue has its own references, so memory may be unmapped or freed once the batch is
//! returned, and the pages stay until they have been sent. But their contents must not change: a guest's memory must
//! not be reused before the peer has confirmed that it has all of it (order 3).

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;

use super::page_channel::Switch;
use crate::observe::SpliceCounts;
use crate::sys::{FdKind, PagePipe, SendPart, Stop, send_parts};
use crate::transport::stream::{End, SendBackend, StreamKind};
use crate::transport::{ChannelError, StreamChannel};

/// Size of the pipe in bytes: a whole packet of pages. A larger one was not faster.
const PIPE_BYTES: usize = 512 << 10;
/// With a smaller pipe there are so many calls that copying is faster.
const LEAST_BYTES: usize = 64 << 10;

const SLOWER_ON_UNIX: &str = "on a UNIX socket pages move faster by copies";

/// Counters of sending by reference on all channels of a connection, and whether it is still tried.
#[derive(Debug)]
pub(super) struct SpliceTally {
    bytes: AtomicU64,
    copied: AtomicU64,
    pub(super) switch: Switch,
}

impl Default for SpliceTally {
    fn default() -> Self {
        Self { bytes: AtomicU64::new(0), copied: AtomicU64::new(0), switch: Switch::named("splicing pages") }
    }
}

impl SpliceTally {
    pub(super) fn counts(&self) -> SpliceCounts {
        SpliceCounts {
            bytes: self.bytes.load(Ordering::Relaxed),
            copied: self.copied.load(Ordering::Relaxed),
            off: self.switch.why_off(),
        }
    }
}

/// Sending by reference on one channel.
#[derive(Debug)]
pub(super) struct Splicing {
    tally: Arc<SpliceTally>,
    pipe: PagePipe,
}

impl Splicing {
    /// `None`, with the reason in the tally, if pages can't or should not be sent by reference.
    pub(super) fn over(channel: &StreamChannel, tally: &Arc<SpliceTally>) -> Option<Self> {
        let end = channel.end().0;
        if end.stream_kind != StreamKind::Tcp {
            tally.switch.turn_off(SLOWER_ON_UNIX);
            return None;
        }
        match PagePipe::with_room(PIPE_BYTES, LEAST_BYTES) {
            Ok(pipe) => Some(Self { tally: Arc::clone(tally), pipe }),
            Err(error) => {
                tally.switch.turn_off(format!(
                    "no pipe for it: {error}; raise the limit on open files or fs.pipe-user-pages-soft"
                ));
                None
            }
        }
    }

    pub(super) fn is_on(&self) -> bool {
        self.tally.switch.is_on()
    }

    /// Sends own bytes; `more` means that pages follow and both are sent together.
    pub(super) fn send_head(
        &mut self,
        channel: &mut StreamChannel,
        head: &[SendPart<'_>],
        more: bool,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        channel.send_by(&mut Copied { more }, head, stop)
    }

    /// Pages of one packet.
    pub(super) fn send_pages(
        &mut self,
        channel: &mut StreamChannel,
        pages: &[SendPart<'_>],
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        debug_assert!(pages.iter().all(|part| matches!(part, SendPart::Guest(_))), "own bytes may change");
        debug_assert_eq!(self.pipe.held(), 0, "the packet before has left");
        channel.send_by(&mut Packet { way: self, by_copy: false }, pages, stop)
    }
}

/// The kernel copies the bytes.
struct Copied {
    more: bool,
}

impl SendBackend for Copied {
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        send_parts(end.fd.as_fd(), if self.more { FdKind::More } else { end.kind() }, parts, skip)
    }
}

/// The pages of one packet while it is sent. The pipe holds those that follow the ones in the socket, in order, so that
/// no page is lost or duplicated when the rest is copied.
struct Packet<'a> {
    way: &'a mut Splicing,
    /// The rest of the packet is copied.
    by_copy: bool,
}

impl Packet<'_> {
    fn copy(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        let count = send_parts(end.fd.as_fd(), end.kind(), parts, skip)?;
        self.way.tally.copied.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    /// Fills the pipe with the pages that follow its content. `false` if it stays empty: the pages can only be copied.
    fn fill(&mut self, parts: &[SendPart<'_>], skip: usize) -> bool {
        let Splicing { tally, pipe } = &mut *self.way;
        let held = pipe.held();
        let Err(error) = pipe.refer_to(parts, skip + held) else { return pipe.held() > 0 };
        match Errno::from_io_error(&error) {
            // The content of the pipe is sent first; the error will be reported again.
            _ if held > 0 => true,
            // Memory of a device, or without pages of its own: other pages may still be referenced.
            Some(Errno::FAULT) => false,
            _ => {
                tally.switch.turn_off(format!("the kernel refers to no pages: {error}"));
                false
            }
        }
    }
}

impl SendBackend for Packet<'_> {
    fn send(&mut self, end: &End, parts: &[SendPart<'_>], skip: usize) -> std::io::Result<usize> {
        let left = parts.iter().map(SendPart::len).sum::<usize>().saturating_sub(skip);
        let may_fill = self.way.pipe.held() < left;
        if self.by_copy || may_fill && !self.fill(parts, skip) {
            self.by_copy = true;
            return self.copy(end, parts, skip);
        }
        let Splicing { tally, pipe } = &mut *self.way;
        let more = pipe.held() < left;
        let why = match pipe.pass_on(end.fd.as_fd(), more) {
            Ok(count) if count > 0 => {
                tally.bytes.fetch_add(count as u64, Ordering::Relaxed);
                return Ok(count);
            }
            Ok(_) => "it takes nothing".to_owned(),
            Err(error) => match Errno::from_io_error(&error) {
                // Not an error of the connection but of the call: forbidden, or unsupported by this kind of socket.
                Some(Errno::INVAL | Errno::PERM | Errno::NOSYS | Errno::OPNOTSUPP | Errno::ACCESS) => {
                    error.to_string()
                }
                _ => return Err(error),
            },
        };
        tally.switch.turn_off(format!("the socket takes no references to pages: {why}"));
        // The pipe is not used again: its pages are copied from memory.
        self.by_copy = true;
        self.copy(end, parts, skip)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use super::*;
    use crate::sys::testing::memory_of_the_kernel;
    use crate::sys::{CancelToken, Mapping};
    use crate::transport::StreamOptions;

    const PAGE: usize = 4096;

    fn pair() -> (StreamChannel, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        socket2::SockRef::from(&near).set_send_buffer_size(1 << 16).unwrap();
        let near = StreamChannel::from_fd(near.into(), "the destination", &StreamOptions::default()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    fn stop() -> Stop {
        Stop::on(&CancelToken::default()).within(Duration::from_secs(20))
    }

    /// Pages that differ, of which every other one is sent.
    fn scattered(memory: &Mapping, pages: usize) -> (Vec<SendPart<'_>>, Vec<u8>) {
        let region = memory.region();
        let (mut parts, mut bytes) = (Vec::new(), Vec::new());
        for page in 0..pages {
            let span = region.span((2 * page * PAGE) as u64, PAGE as u64).unwrap();
            let content: Vec<u8> = (0..PAGE).map(|at| (at / 8 * 31 + page) as u8).collect();
            span.copy_from(&content);
            parts.push(SendPart::Guest(span));
            bytes.extend(content);
        }
        (parts, bytes)
    }

    /// Through a pipe and a socket that accept the packet only in many pieces.
    #[test]
    fn headers_and_pages_arrive_in_order_whatever_the_pieces() {
        let (mut near, mut far) = pair();
        let memory = Mapping::memfd("splicing", 256 * PAGE as u64).unwrap();
        let (parts, pages) = scattered(&memory, 128);
        let mut expected = Vec::new();
        for round in 0..20 {
            expected.extend([round; 100]);
            expected.extend_from_slice(&pages);
        }
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            far.read_to_end(&mut got).unwrap();
            got
        });
        let tally = Arc::new(SpliceTally::default());
        let mut way = Splicing::over(&near, &tally).unwrap();
        way.pipe = PagePipe::with_room(1 << 16, 1 << 16).unwrap();
        for round in 0..20 {
            way.send_head(&mut near, &[SendPart::Own(&[round; 100])], true, &stop()).unwrap();
            way.send_pages(&mut near, &parts, &stop()).unwrap();
        }
        drop((near, way));
        assert!(reader.join().unwrap() == expected);
        let counts = tally.counts();
        assert_eq!((counts.bytes, counts.copied, counts.off), (20 * pages.len() as u64, 0, None));
    }

    #[test]
    fn pages_that_can_not_be_referred_to_are_copied_in_their_place() {
        let (mut near, mut far) = pair();
        let memory = Mapping::anonymous(4 * PAGE as u64).unwrap();
        let (guest, bytes) = scattered(&memory, 2);
        let kernels = memory_of_the_kernel();
        let parts = [guest[0], SendPart::Guest(kernels.span(0, PAGE as u64).unwrap()), guest[1]];
        let tally = Arc::new(SpliceTally::default());
        let mut way = Splicing::over(&near, &tally).unwrap();
        way.send_pages(&mut near, &parts, &stop()).unwrap();
        way.send_pages(&mut near, &guest, &stop()).unwrap();
        let mut got = vec![0; 5 * PAGE];
        far.read_exact(&mut got).unwrap();
        assert!(got[..PAGE] == bytes[..PAGE] && got[2 * PAGE..3 * PAGE] == bytes[PAGE..]);
        assert!(got[3 * PAGE..] == bytes, "the next packet goes by reference again");
        let counts = tally.counts();
        assert_eq!((counts.bytes, counts.copied, counts.off), (3 * PAGE as u64, 2 * PAGE as u64, None));
    }

    /// A socket that refuses the call: the pages in the pipe are copied, once.
    #[test]
    fn a_refusal_between_pipe_and_socket_loses_and_doubles_nothing() {
        let (near, mut far) = pair();
        let memory = Mapping::anonymous(32 * PAGE as u64).unwrap();
        let (parts, bytes) = scattered(&memory, 16);
        let tally = Arc::new(SpliceTally::default());
        let mut way = Splicing::over(&near, &tally).unwrap();
        let mut packet = Packet { way: &mut way, by_copy: false };
        // Filled, and then set to copy, as after a refusal.
        assert!(packet.fill(&parts, 0) && packet.way.pipe.held() == 16 * PAGE);
        packet.by_copy = true;
        let mut sent = 0;
        while sent < bytes.len() {
            sent += packet.send(near.end().0, &parts, sent).unwrap();
        }
        drop(near);
        let mut got = Vec::new();
        far.read_to_end(&mut got).unwrap();
        assert!(got == bytes);
        assert_eq!(tally.counts().copied, bytes.len() as u64);
    }

    #[test]
    fn a_stop_ends_the_wait_for_room() {
        let (mut near, _far) = pair();
        let memory = Mapping::anonymous(256 * PAGE as u64).unwrap();
        let (parts, _) = scattered(&memory, 128);
        let tally = Arc::new(SpliceTally::default());
        let mut way = Splicing::over(&near, &tally).unwrap();
        let limit = stop().within(Duration::from_millis(200));
        let error = loop {
            if let Err(error) = way.send_pages(&mut near, &parts, &limit) {
                break error;
            }
        };
        assert!(matches!(error, ChannelError::Stopped { .. }), "{error}");
    }

    #[test]
    fn a_unix_socket_is_left_to_copies_and_that_is_said() {
        let (near, _far) = UnixStream::pair().unwrap();
        let near = StreamChannel::from_fd(near.into(), "peer", &StreamOptions::default()).unwrap();
        let tally = Arc::new(SpliceTally::default());
        assert!(Splicing::over(&near, &tally).is_none());
        assert!(tally.counts().off.is_some_and(|why| why.contains("UNIX")));
    }
}
