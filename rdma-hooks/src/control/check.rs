//! Checks of a payload, and the errors for one that fails them.

use super::record::{Compress, Record, be32};
use super::{Kind, MAX_REPEAT, Message};

/// Why bytes received on a queue pair are not a control message.
///
/// All of these mean a broken or hostile peer: the connection is given up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Fewer bytes than a header.
    #[error("control message of {have} bytes is shorter than its header (16)")]
    ShortHeader {
        /// Bytes received.
        have: usize,
    },
    /// The header's length is not what arrived.
    #[error("control message type {kind} announces {announced} payload bytes, {received} arrived")]
    LengthMismatch {
        /// Type as on the wire.
        kind: u32,
        /// Length in the header.
        announced: u32,
        /// Payload bytes received.
        received: usize,
    },
    /// A type this protocol does not have.
    #[error("unknown control message type {kind}")]
    UnknownKind {
        /// Type as on the wire.
        kind: u32,
    },
    /// More (or fewer) records than any message may have.
    #[error("control message {kind:?} has repeat {repeat}, allowed are {min} to {max}")]
    Repeat {
        /// Which message.
        kind: Kind,
        /// Record count in the header.
        repeat: u32,
        /// Fewest records.
        min: u32,
        /// Most records.
        max: u32,
    },
    /// The payload is not a whole number of records, or not the announced number.
    #[error("control message {kind:?}: {len} payload bytes are not {repeat} records of {record} bytes")]
    RecordBytes {
        /// Which message.
        kind: Kind,
        /// Payload bytes.
        len: usize,
        /// Record count in the header.
        repeat: u32,
        /// Bytes of one record.
        record: usize,
    },
    /// COMPRESS with anything but zeros.
    #[error("COMPRESS fills with {value:#x}; only zero is defined")]
    CompressValue {
        /// Fill value.
        value: u32,
    },
    /// A piece of the byte stream without bytes, on which a QEMU would wait for ever.
    #[error("empty piece of the byte stream")]
    EmptyStream,
}

/// Header and payload of a message whose sizes agree.
pub(super) struct Head<'a> {
    pub(super) kind: Kind,
    pub(super) repeat: u32,
    pub(super) payload: &'a [u8],
}

impl<'a> Head<'a> {
    fn bad_length(&self, record: usize) -> WireError {
        WireError::RecordBytes { kind: self.kind, len: self.payload.len(), repeat: self.repeat, record }
    }

    pub(super) fn bare<'m>(&self, message: Message<'m>) -> Result<Message<'m>, WireError> {
        if self.payload.is_empty() { Ok(message) } else { Err(self.bad_length(0)) }
    }

    fn records<R: Record>(&self) -> Vec<R> {
        self.payload.chunks_exact(R::BYTES).map(R::read).collect()
    }

    /// As many records as fit, with no remaining bytes; may be none.
    pub(super) fn whole_records<R: Record>(&self) -> Result<Vec<R>, WireError> {
        if self.payload.len().is_multiple_of(R::BYTES) {
            Ok(self.records())
        } else {
            Err(self.bad_length(R::BYTES))
        }
    }

    /// At least one record, no remaining bytes, and not more than `repeat`.
    pub(super) fn some_records<R: Record>(&self) -> Result<Vec<R>, WireError> {
        let records = self.whole_records()?;
        let fits = !records.is_empty() && records.len() <= self.repeat as usize;
        if fits { Ok(records) } else { Err(self.bad_length(R::BYTES)) }
    }

    /// Exactly `repeat` records, at least one.
    pub(super) fn counted_records<R: Record>(&self) -> Result<Vec<R>, WireError> {
        if self.repeat == 0 {
            return Err(WireError::Repeat { kind: self.kind, repeat: 0, min: 1, max: MAX_REPEAT });
        }
        if self.payload.len() != self.repeat as usize * R::BYTES {
            return Err(self.bad_length(R::BYTES));
        }
        Ok(self.records())
    }

    pub(super) fn compress(&self) -> Result<Compress, WireError> {
        if self.repeat != 1 || self.payload.len() != Compress::BYTES {
            return Err(self.bad_length(Compress::BYTES));
        }
        self.zero_ranges().map(|ranges| ranges.first().copied().unwrap_or_default())
    }

    /// Exactly `repeat` ranges, at least one, none filled with anything but zero.
    pub(super) fn zero_ranges(&self) -> Result<Vec<Compress>, WireError> {
        let ranges = self.counted_records()?;
        let values = self.payload.chunks_exact(Compress::BYTES).map(|record| be32(record, 0));
        match values.into_iter().find(|&value| value != 0) {
            None => Ok(ranges),
            Some(value) => Err(WireError::CompressValue { value }),
        }
    }
}
