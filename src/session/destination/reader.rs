//! The buffer between socket and parser.

use crate::stream::qemu::incoming::{IncomingConfig, IncomingStream};

/// Bytes read at a time: a buffer that stays in the second-level cache costs less than the copy it saves.
const BUFFER: usize = 256 << 10;

/// A parser, the bytes that it has not consumed yet, and the total number of received bytes.
pub(super) struct StreamReader {
    pub(super) stream: IncomingStream,
    pub(super) buffer: Vec<u8>,
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) at: u64,
}

impl StreamReader {
    pub(super) fn new(config: IncomingConfig) -> Self {
        let stream = IncomingStream::new(config);
        Self { stream, buffer: vec![0; BUFFER], start: 0, end: 0, at: 0 }
    }

    /// Continues with another connection, which begins between two items of the stream.
    pub(super) fn restart(&mut self) {
        self.stream.restart();
        (self.start, self.end) = (0, 0);
    }

    /// Moves the remaining bytes to the front, so that the next read is a large one.
    pub(super) fn make_room(&mut self, needed: usize) {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // The parser promises to need less than the buffer; a larger buffer would still be bounded by that need.
        if needed > self.buffer.len() {
            self.buffer.resize(needed, 0);
        }
    }
}
