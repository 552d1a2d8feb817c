//! A whole incoming stream on one channel, step by step.
//!
//! [`IncomingStream`] takes bytes and returns events. It owns no socket and never waits:
//!
//! ```
//! use ramwire::stream::DecodeError;
//! use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
//!
//! /// Counts the zero pages of a captured stream.
//! fn zero_pages(capture: &[u8]) -> Result<u64, DecodeError> {
//!     let mut stream = IncomingStream::new(IncomingConfig::default());
//!     let (mut at, mut count) = (0, 0);
//!     loop {
//!         match stream.next(&capture[at..])? {
//!             Step::Event { consumed, event } => {
//!                 at += consumed;
//!                 match event {
//!                     Event::Zero { .. } => count += 1,
//!                     Event::Done => return Ok(count),
//!                     _ => {}
//!                 }
//!             }
//!             // A reader on a socket drops `consumed` bytes, keeps the rest and reads until it has `needed`.
//!             Step::NeedMore { consumed: _, needed: _ } => {
//!                 stream.finish()?;
//!                 return Ok(count);
//!             }
//!         }
//!     }
//! }
//! ```
//!
//! - **Drain first, then read.** Call [`next`](IncomingStream::next) until it returns [`Step::NeedMore`]; an event may
//!   be due without further input.
//! - **Events borrow the input**, never the machine: the bytes of a page are a slice of the caller's buffer. `needed`
//!   never exceeds [`max_needed`](IncomingStream::max_needed), some 70 KiB, so a buffer of 256 KiB is sufficient.
//! - **The raw bytes of an event** are the `consumed` bytes it took. A relay keeps a configuration or a section it does
//!   not understand by copying them.
//! - **Positions in errors** count from the first byte of the stream.
//!
//! # What it checks
//!
//! Order and form of the items, section ids, footers, the block list, the current block, that each page lies inside its
//! block, limits. The caller checks the rest: which blocks exist here and which are ignored, whether the configuration
//! fits, what a command means for the migration.
//!
//! # Where RAM ends
//!
//! After RAM come device sections without length. The machine changes from parsing to copying at the first FULL section
//! after `ram` END, or, where a snapshot has no END, after a PART. From there every byte is [`Event::TailBytes`] until
//! the VM description has arrived whole; see [`tail`](super::tail).

mod event;
#[cfg(test)]
mod framing_tests;
mod machine;
mod table;
#[cfg(test)]
mod tests;

pub use event::{Ending, Event, SectionKind, Seen, Step};
pub use machine::IncomingStream;
pub use table::AnnouncedBlocks;

use crate::units::PageSize;

/// Configuration of an [`IncomingStream`].
#[derive(Clone, Debug)]
pub struct IncomingConfig {
    /// Target page size: 4 KiB on x86.
    pub page_size: PageSize,
    /// Use the target page size that the stream announces, instead of refusing one other than `page_size`.
    pub adopt_page_size: bool,
    /// Accept zero-page records with a fill byte other than zero, as old receivers do. They are returned as
    /// [`Event::Filled`].
    pub accept_fill: bool,
    /// Accept RDMA marks, which are allowed on that transport only.
    pub accept_hooks: bool,
    /// Offset in its file at which the stream begins: a mapped-ram file counts offsets from the file's first byte.
    pub starts_at: u64,
    /// Length of the file in bytes, if the stream is in one: no offset of a mapped-ram file may lie beyond.
    pub file_len: Option<u64>,
    /// Limits on what the peer may announce.
    pub limits: StreamLimits,
}

impl Default for IncomingConfig {
    fn default() -> Self {
        Self {
            page_size: PageSize::SIZE_4K,
            adopt_page_size: false,
            accept_fill: false,
            accept_hooks: false,
            starts_at: 0,
            file_len: None,
            limits: StreamLimits::default(),
        }
    }
}

/// Limits on what the peer may announce. All are checked before memory is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamLimits {
    /// All RAM blocks together, in bytes.
    pub ram_bytes: u64,
    /// Device sections and VM description, in bytes. They are kept in memory.
    pub tail_bytes: usize,
    /// The VM description, in bytes.
    pub description_bytes: u32,
    /// The device state of a postcopy migration, in bytes.
    pub package_bytes: u32,
}

impl Default for StreamLimits {
    /// 64 TiB of RAM, 256 MiB of device state, 64 MiB of description, 1 GiB of package.
    fn default() -> Self {
        Self {
            ram_bytes: 64 << 40,
            tail_bytes: 256 << 20,
            description_bytes: 64 << 20,
            package_bytes: 1 << 30,
        }
    }
}
