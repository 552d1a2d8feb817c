//! The destination's end of a link whose pages come in the stream.

use std::sync::Arc;

use crate::guest::Placer;
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::sys::Stop;
use crate::transport::{ByteSource, ChannelError, DestinationAbilities, DestinationLink, MoveError};

/// The link of a plain byte stream: the session parses the pages in it and places them.
pub struct InlineDestination {
    stream: Box<dyn ByteSource>,
}

impl InlineDestination {
    /// All pages come in `stream`.
    pub fn new(stream: Box<dyn ByteSource>) -> Self {
        Self { stream }
    }
}

impl crate::transport::Sealed for InlineDestination {}

impl DestinationLink for InlineDestination {
    fn abilities(&self) -> DestinationAbilities {
        DestinationAbilities::default()
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        &mut *self.stream
    }

    fn announce(&mut self, _placer: &Arc<Placer>, _blocks: &AnnouncedBlocks) -> Result<(), MoveError> {
        Ok(())
    }

    /// Only the reader of the stream places pages.
    fn revoke(&mut self) {}

    /// A stream has no end beyond its own.
    fn close(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
}
