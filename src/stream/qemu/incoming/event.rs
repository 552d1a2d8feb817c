//! What an incoming stream says, one step at a time.

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
    /// The first `consumed` bytes of the input mean this.
    Event {
        /// Bytes taken; may be zero.
        consumed: usize,
        /// What they mean.
        event: Event<'a>,
    },
    /// The input is used up, or holds the beginning of a value only.
    NeedMore {
        /// Bytes taken and remembered: not to be given again.
        consumed: usize,
        /// Bytes that are needed at least, counted behind those consumed.
        needed: usize,
    },
}

/// Whose section it is. Other iterables are refused where they start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SectionKind {
    /// Guest RAM.
    Ram,
    /// Dirty bitmaps of disks.
    DirtyBitmap,
    /// Which parts of a memory device are plugged, told in front of the first page.
    EarlyVirtioMem,
    /// Device state between ramwire ends: a section with a length, behind which commands follow.
    NativeState,
}

/// A piece of the stream and its meaning.
///
/// A block is named by its position in the announced list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Header and configuration have arrived. Where there is no configuration section it is empty.
    Configuration(Configuration),
    /// A command between the sections.
    Command(Command<'a>),
    /// A piece of the package that follows [`Command::Packaged`].
    PackageBytes(&'a [u8]),
    /// The package has arrived whole.
    PackageEnd,
    /// A section begins; its header has been taken.
    SectionStart {
        /// START, PART, END or FULL.
        phase: Phase,
        /// Its id.
        id: u32,
        /// Whose it is.
        kind: SectionKind,
    },
    /// The section's footer has arrived and was right.
    SectionEnd {
        /// START, PART, END or FULL.
        phase: Phase,
        /// Whose it was.
        kind: SectionKind,
    },
    /// The list of RAM blocks has arrived whole. It comes again if the source repeats it, which it may do unchanged.
    Blocks(Vec<BlockAnnouncement>),
    /// A block of a file with fixed page places: header and bitmap position. Only under `mapped-ram`.
    MappedBlock {
        /// The block, next in the list.
        block: BlockAnnouncement,
        /// Where its bitmap and pages stand in the file.
        header: MappedHeader,
    },
    /// The bytes between a mapped-ram header and the next item: bitmap, gap and pages.
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
    /// The records of a `ram` section end: the barrier of the multifd channels where no record is. Its footer may come
    /// only after the barrier is passed.
    RecordsEnd,
    /// An early virtio-mem section; [`VirtioMem::bitmap_len`] bytes follow as [`Event::SectionBytes`].
    VirtioMem(VirtioMem),
    /// The head of a chunk of a dirty-bitmap section.
    BitmapChunk,
    /// Bytes of a section that is only carried.
    SectionBytes(&'a [u8]),
    /// The items end without device sections. In postcopy [`Event::Done`] follows at once; otherwise a VM description
    /// is waited for, as behind device sections.
    Eof,
    /// Bytes of the tail. They are kept in [`IncomingStream::tail`](super::IncomingStream::tail) too.
    TailBytes(&'a [u8]),
    /// The stream is whole. Every later call answers the same and takes nothing.
    Done,
}

/// What a stream has shown of its sender, so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seen {
    /// What stands around the sections; footers are taken for granted until the first section has ended.
    pub framing: Framing,
    /// A SWITCHOVER_START came.
    pub switchover_start: bool,
    /// A multifd barrier record stood in the `ram` START, whose records have ended; `None`: not reached yet.
    pub barrier_in_start: Option<bool>,
    /// The return path was opened.
    pub return_path: bool,
    /// Postcopy of RAM was advised.
    pub postcopy_advised: bool,
    /// `ram` END came, and with it the whole RAM.
    pub ram_end: bool,
}

/// How a stream ended whose channel was closed in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Every part has come, [`Event::Done`] has been told.
    Whole,
    /// No VM description came. The last byte is an end of file, so the device state may be whole; nothing proves it.
    NoDescription,
}
