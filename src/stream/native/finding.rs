//! MEMORY_CHECK: what a source has found in its memory.

use super::{Range, Reader, Writer};
use crate::stream::error::DecodeError;

/// The result of comparing all memory with the pages that were sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It equals the pages that were sent.
    Equal {
        /// Pages that were compared.
        pages: u64,
    },
    /// It is not.
    Differs {
        /// Position of the first block that differs in the stream's list.
        block: u32,
        /// The first run of pages that do.
        range: Range,
        /// All pages that do.
        pages: u64,
    },
    /// It could not be compared.
    NotMade,
}

impl Finding {
    pub(super) fn encode(self, writer: &mut Writer<'_>) {
        match self {
            Self::Equal { pages } => writer.u8(0).be64(pages),
            Self::Differs { block, range, pages } => {
                writer.u8(1).be64(pages).be32(block).bytes(&range.encode())
            }
            Self::NotMade => writer.u8(2),
        };
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Option<Self>, DecodeError> {
        Ok(match reader.u8()? {
            0 => Some(Self::Equal { pages: reader.be64()? }),
            1 => {
                let (pages, block) = (reader.be64()?, reader.be32()?);
                let range = Range { first: reader.be64()?, pages: reader.be64()? };
                Some(Self::Differs { block, range, pages })
            }
            2 => Some(Self::NotMade),
            _ => None,
        })
    }
}
