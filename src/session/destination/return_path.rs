//! The return path: answers, and in postcopy requests for missing pages.

use std::sync::{Arc, Mutex, MutexGuard};

use crate::guest::Placer;
use crate::ram::Landing;
use crate::stream::qemu::return_path::Message;
use crate::sys::{Lock as _, SendPart, Stop};
use crate::transport::{ByteSink, ChannelError};
use crate::units::BlockIndex;

/// The return path. Several threads write messages to it, one message at a time, and a later connection replaces its
/// sink.
#[derive(Clone)]
pub(super) struct ReturnPathWriter(Arc<Mutex<Back>>);

struct Back {
    sink: Option<Box<dyn ByteSink>>,
    /// The block of the last request: the next one of the same block need not name it.
    last: Option<BlockIndex>,
    /// The source accepts requests: not between two connections, and on the second not before it has sent RESUME.
    takes_requests: bool,
}

impl ReturnPathWriter {
    pub(super) fn new(sink: Box<dyn ByteSink>) -> Self {
        Self(Arc::new(Mutex::new(Back { sink: Some(sink), last: None, takes_requests: true })))
    }

    fn lock(&self) -> MutexGuard<'_, Back> {
        self.0.locked()
    }

    /// The connection is gone, or another was opened. Requests wait for [`resume`](Self::resume).
    pub(super) fn replace(&self, sink: Option<Box<dyn ByteSink>>) {
        *self.lock() = Back { sink, last: None, takes_requests: false };
    }

    /// Bytes that the source's host has not acknowledged.
    pub(super) fn unacknowledged(&self) -> u64 {
        self.lock().sink.as_ref().map_or(0, |sink| sink.unacknowledged())
    }

    pub(super) fn write(&self, bytes: &[u8], stop: &Stop) -> Result<(), ChannelError> {
        self.lock().write(bytes, stop)
    }

    pub(super) fn message(&self, message: Message<'_>, stop: &Stop) -> Result<(), ChannelError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.write(&bytes, stop)
    }

    /// Requests a host page; later, if the source accepts no requests now.
    pub(super) fn ask(&self, placer: &Placer, landing: Landing, stop: &Stop) -> Result<(), ChannelError> {
        let mut back = self.lock();
        if back.takes_requests { back.ask(placer, landing, stop) } else { Ok(()) }
    }

    /// The source accepts requests again: sends `message`, and requests each of `pages`.
    pub(super) fn resume(
        &self,
        message: Message<'_>,
        placer: &Placer,
        pages: impl FnOnce() -> Vec<Landing>,
        stop: &Stop,
    ) -> Result<(), ChannelError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let mut back = self.lock();
        back.write(&bytes, stop)?;
        back.takes_requests = true;
        // A fault that is not among them yet waits for this lock, and then sends its request.
        pages().into_iter().try_for_each(|page| back.ask(placer, page, stop))
    }
}

impl Back {
    fn write(&mut self, bytes: &[u8], stop: &Stop) -> Result<(), ChannelError> {
        let Some(sink) = &mut self.sink else {
            return Err(ChannelError::Closed { peer: "the source".into(), doing: "answering it" });
        };
        sink.send(&[SendPart::Own(bytes)], stop)?;
        sink.flush(stop)
    }

    fn ask(&mut self, placer: &Placer, landing: Landing, stop: &Stop) -> Result<(), ChannelError> {
        let (start, length) = (landing.offset().0, landing.len() as u32);
        let message = match placer.memory().table().get(landing.block()) {
            Some(block) if self.last.replace(landing.block()) != Some(landing.block()) => {
                Message::RequestPagesOf { block: block.name.as_str(), start, length }
            }
            _ => Message::RequestPages { start, length },
        };
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        self.write(&bytes, stop)
    }
}
