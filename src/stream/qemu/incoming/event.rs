//! Events of an incoming stream, one step at a time.

use super::super::blocks::BlockAnnouncement;
use super::super::command::Command;
use super::super::early::VirtioMem;
use super::super::file::Configuration;
use super::super::mapped::MappedHeader;
use super::super::section::{Framing, Phase};
use crate::units::{BlockIndex, BlockOffset};

/// The answer to some bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step<'a> {
    /// The event of the first `consumed` bytes of the input.
    Event {
        /// Bytes taken; may be zero.
        consumed: usize,
        /// What they mean.
        event: Event<'a>,
    },
    /// The input is used up, or holds only the beginning of a value.
    NeedMore {
        /// Bytes that were consumed: not to be passed again.
        consumed: usize,
        /// Minimum number of bytes that are needed, counted after those consumed.
        needed: usize,
    },
}

/// The owner of a section. Other iterables are refused at their start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// Guest RAM.
    Ram,
    /// Dirty bitmaps of disks.
    DirtyBitmap,
    /// Which parts of a memory device are plugged, sent before the first page.
    EarlyVirtioMem,
    /// Device state between ramwire ends: a section with a length, after which commands follow.
    NativeState,
}

/// A piece of the stream and its meaning.
///
/// A block is named by its position in the announced list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Header and configuration have arrived. The configuration is empty if the stream has no such section.
    Configuration(Configuration),
    /// A command between the sections.
    Command(Command<'a>),
    /// A piece of the package that follows [`Command::Packaged`].
    PackageBytes(&'a [u8]),
    /// The package has arrived whole.
    PackageEnd,
    /// A section begins; its header has been consumed.
    SectionStart {
        /// START, PART, END or FULL.
        phase: Phase,
        /// Its id.
        id: u32,
        /// Its owner.
        kind: SectionKind,
    },
    /// The section's footer has arrived and is correct.
    SectionEnd {
        /// START, PART, END or FULL.
        phase: Phase,
        /// Its owner.
        kind: SectionKind,
    },
    /// The list of RAM blocks has arrived completely. It comes again if the source repeats it, which it may do
    /// unchanged.
    Blocks(Vec<BlockAnnouncement>),
    /// A block of a file with fixed page places: header and bitmap position. Only under `mapped-ram`.
    MappedBlock {
        /// The block, next in the list.
        block: BlockAnnouncement,
        /// Position of its bitmap and pages in the file.
        header: MappedHeader,
    },
    /// The bytes from a mapped-ram header to the next item: bitmap, gap and pages.
    MappedBytes(&'a [u8]),
    /// A whole page.
    Page {
        /// Its block.
        block: BlockIndex,
        /// Its offset in the block.
        offset: BlockOffset,
        /// One page of bytes.
        bytes: &'a [u8],
    },
    /// A page of zeros.
    Zero {
        /// Its block.
        block: BlockIndex,
        /// Its offset in the block.
        offset: BlockOffset,
    },
    /// A page of one repeated byte other than zero.
    Filled {
        /// Its block.
        block: BlockIndex,
        /// Its offset in the block.
        offset: BlockOffset,
        /// The byte.
        byte: u8,
    },
    /// A page as a zlib stream, for [`inflate_page`](super::super::compressed::inflate_page).
    Compressed {
        /// Its block.
        block: BlockIndex,
        /// Its offset in the block.
        offset: BlockOffset,
        /// The zlib stream.
        bytes: &'a [u8],
    },
    /// A page as a difference, for [`xbzrle::decode`](crate::stream::xbzrle::decode).
    Xbzrle {
        /// Its block.
        block: BlockIndex,
        /// Its offset in the block.
        offset: BlockOffset,
        /// The encoding; may be empty.
        bytes: &'a [u8],
    },
    /// The RDMA transport's round begins.
    Hook {
        /// Upper bits of the record word.
        argument: u64,
    },
    /// Barrier of the multifd channels.
    MultifdFlush,
    /// The records of a `ram` section end. This is the barrier of the multifd channels for senders without a barrier
    /// record. The footer may be read only after the barrier is passed.
    RecordsEnd,
    /// An early virtio-mem section; [`VirtioMem::bitmap_len`] bytes follow as [`Event::SectionBytes`].
    VirtioMem(VirtioMem),
    /// The head of a chunk of a dirty-bitmap section.
    BitmapChunk,
    /// Bytes of a section that is copied without being parsed.
    SectionBytes(&'a [u8]),
    /// The items end without device sections. In postcopy [`Event::Done`] follows immediately; otherwise a VM
    /// description must follow, as after device sections.
    Eof,
    /// Bytes of the tail. [`IncomingStream::tail`](super::IncomingStream::tail) keeps them too.
    TailBytes(&'a [u8]),
    /// The stream is complete. Every later call returns the same and consumes nothing.
    Done,
}

/// What the stream has shown about its sender so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seen {
    /// Whether there are a configuration section and footers; footers are assumed until the first section has ended.
    pub framing: Framing,
    /// A SWITCHOVER_START was received.
    pub switchover_start: bool,
    /// A multifd barrier record was in the `ram` START, whose records have ended; `None`: not reached yet.
    pub barrier_in_start: Option<bool>,
    /// The return path was opened.
    pub return_path: bool,
    /// Postcopy of RAM was advised.
    pub postcopy_advised: bool,
    /// `ram` END was received, and with it the whole RAM.
    pub ram_end: bool,
}

/// How a stream ended whose channel was closed in an orderly way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// All parts were received and [`Event::Done`] was returned.
    Whole,
    /// No VM description was received. The last byte is an end of file, so the device state may be complete; nothing
    /// proves it.
    NoDescription,
}
