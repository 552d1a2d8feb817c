//! The server's side: one connection at a time, which a thread of the caller's serves to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{fill, not_understood};
use crate::stream::page_requests::{
    ANSWER_LEN, Answer, Asked, HELLO_LEN, MAP_PAGE, MAX_WHY, REQUEST_LEN, Request, Welcome, decode_hello,
};
use crate::sys::{SendPart, Stop};
use crate::transport::{ByteSink as _, ChannelError, StoredMemory, StreamChannel};
use crate::units::PageSize;

/// A client that has connected must send HELLO within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);

const WAITING: &str = "waiting for a request for pages";

/// Serves a stored memory, read only. Clones share it.
#[derive(Clone, Debug)]
pub struct PageServer {
    memory: Arc<StoredMemory>,
    all: Arc<Counts>,
}

/// What all clients have read so far.
#[derive(Debug, Default)]
struct Counts {
    reads: AtomicU64,
    bytes: AtomicU64,
    failed: AtomicU64,
}

/// What clients have read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServedPages {
    /// Reads that were answered.
    pub reads: u64,
    /// Bytes of memory in those answers.
    pub bytes: u64,
    /// Reads that failed here; their clients received the reason.
    pub failed: u64,
}

impl PageServer {
    /// Serves `memory`.
    pub fn new(memory: Arc<StoredMemory>) -> Self {
        Self { memory, all: Arc::default() }
    }

    /// What all clients of this server and its clones have read so far, those that are connected too.
    pub fn served(&self) -> ServedPages {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Counts { reads, bytes, failed } = &*self.all;
        ServedPages { reads: read(reads), bytes: read(bytes), failed: read(failed) }
    }

    /// Serves one client, on this thread, until it closes the connection.
    ///
    /// # Errors
    /// [`ChannelError`]: the connection is lost, or a message makes no sense.
    pub fn serve(&self, channel: StreamChannel, stop: &Stop) -> Result<ServedPages, ChannelError> {
        let mut channel = channel;
        let mut hello = [0; HELLO_LEN];
        if !fill(&mut channel, &mut hello, WAITING, &stop.within(HELLO_TIMEOUT))? {
            return Ok(ServedPages::default());
        }
        decode_hello(&hello).map_err(|error| not_understood(&channel, "greeting it", error))?;
        let mut out = Vec::new();
        Welcome { id: self.memory.identity(), len: self.memory.len() }.encode(&mut out);
        channel.send(&[SendPart::Own(&out)], stop)?;
        // A client whose guests touch nothing requests nothing.
        channel.set_stall(None);
        let (mut served, mut buffer) = (ServedPages::default(), Vec::new());
        loop {
            let mut request = [0; REQUEST_LEN];
            if !fill(&mut channel, &mut request, WAITING, stop)? {
                return Ok(served);
            }
            let request = Request::decode(&request, self.memory.len())
                .map_err(|error| not_understood(&channel, "taking a request for pages", error))?;
            let done = self.answer_into(&request, &mut buffer);
            if let Err(error) = &done {
                let why = error.to_string();
                let end = (0..=why.len().min(MAX_WHY)).rev().find(|at| why.is_char_boundary(*at));
                buffer = why.as_bytes()[..end.unwrap_or(0)].to_vec();
                served.failed += 1;
                self.all.failed.fetch_add(1, Ordering::Relaxed);
            } else if request.asked == Asked::Read {
                served.reads += 1;
                served.bytes += request.len;
                self.all.reads.fetch_add(1, Ordering::Relaxed);
                self.all.bytes.fetch_add(request.len, Ordering::Relaxed);
            }
            let mut head = Vec::with_capacity(ANSWER_LEN);
            Answer { number: request.number, is_done: done.is_ok(), len: buffer.len() as u64 }
                .encode(&mut head);
            channel.send(&[SendPart::Own(&head), SendPart::Own(&buffer)], stop)?;
            channel.flush(stop)?;
        }
    }

    /// Fills `into` with the answer. Its length was checked.
    fn answer_into(&self, request: &Request, into: &mut Vec<u8>) -> std::io::Result<()> {
        into.clear();
        into.resize(usize::try_from(request.answer_len()).unwrap_or(0), 0);
        match request.asked {
            Asked::Read => self.memory.read_at(request.offset, into),
            Asked::Map => {
                let len = request.len.next_multiple_of(MAP_PAGE);
                let present = self.memory.present(request.offset, len, PageSize::SIZE_4K);
                let bytes = present.words().iter().flat_map(|word| word.to_le_bytes());
                into.iter_mut().zip(bytes).for_each(|(into, byte)| *into = byte);
                Ok(())
            }
        }
    }
}
