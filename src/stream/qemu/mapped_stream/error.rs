//! Why a mapped-ram file can't be read.

use std::io;

use crate::stream::error::DecodeError;

/// Why a file can't be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappedReadError {
    /// The stream is invalid at an offset, which is counted from the beginning of the stream.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// It ends too early.
    #[error("it ends inside what begins at {at:#x}: it was not written to its end, save the guest again")]
    Truncated {
        /// Where, in the file.
        at: u64,
    },
    /// It begins with zeros: the writer writes its first word last.
    #[error("the save into it did not end: there is no whole guest in it, save the guest again")]
    NotEnded,
    /// Its note, by which a chain of snapshots is known, makes no sense.
    #[error(
        "the note at its end, which says which snapshot it is, makes no sense; copy the whole file again"
    )]
    Note {
        /// Why.
        source: io::Error,
    },
    /// Its first word and its note differ.
    #[error("{}", if *.is_incremental {
        "it holds only what has changed since another snapshot, and the note at its end, which names that one, is missing; \
         copy the whole file again"
    } else {
        "the note at its end names another snapshot that it would need, and its first word does not; copy the whole file again"
    })]
    NoNote {
        /// Its first word says that it has a base.
        is_incremental: bool,
    },
    /// The snapshot that it was taken against is not there.
    #[error(
        "it holds only what has changed since the snapshot {base}, which can't be opened; put that one there again, or take a \
         snapshot without a base"
    )]
    NoBase {
        /// The file.
        base: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The snapshot that it was taken against can't be read.
    #[error("it holds only what has changed since the snapshot {base}, which can't be read")]
    BadBase {
        /// The file.
        base: String,
        /// Why.
        source: Box<MappedReadError>,
    },
    /// Under the name of the snapshot that it was taken against lies another one.
    #[error(
        "it holds only what has changed since snapshot {wanted}, and {base} is another one ({found}); put the right file \
         there, or take a snapshot without a base"
    )]
    OtherBase {
        /// The file.
        base: String,
        /// The id of the one that is needed.
        wanted: String,
        /// The id of the one that is there, or "none".
        found: String,
    },
    /// The snapshot that it was taken against is of another guest.
    #[error("RAM block {block} is not the same in its base {base}: they are of different guests")]
    UnlikeBase {
        /// The file.
        base: String,
        /// The block.
        block: String,
    },
    /// Bases of bases without end.
    #[error("more than {most} snapshots need each other; take one without a base")]
    LongChain {
        /// Most files.
        most: usize,
    },
    /// A stream without places.
    #[error("the stream has no mapped-ram pages: it is a plain one, read it by file:")]
    Plain,
    /// The kernel's error.
    #[error("reading at {at:#x}")]
    Io {
        /// Where, in the file.
        at: u64,
        /// The answer.
        source: io::Error,
    },
}
