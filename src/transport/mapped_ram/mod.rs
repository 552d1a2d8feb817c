//! A file in which every page has a fixed offset (`mapped:`), as QEMU 9.0 and newer write and read by `file:` with
//! mapped-ram.
//!
//! ```text
//! a guest -- stream --> head and tail of the file, but its first word
//!        \-- pages ---> threads: pwrite to their places
//!                       at the end: bitmaps, fsync, the first word, fsync
//!
//! head and tail of the file --> plain stream --> session, to which the places are page channels
//! places ---------------------> threads: pread into guest RAM
//! ```
//!
//! A file has no peer that answers. Its COMMIT is the first word of the file's stream: once it is written, everything
//! after it is complete and on the disk, and without it there is no guest in the file. So a save that stops at any byte
//! leaves a file that is recognizably incomplete.

mod destination;
mod direct;
mod file;
#[cfg(test)]
mod journal;
mod layers;
mod link;
mod pages;
mod reader;
mod scheme;
mod sink;
mod start;
#[cfg(test)]
mod tests;
mod writer;

pub use destination::MappedDestination;
use destination::open;
pub use link::MappedLink;
use link::create;
pub use pages::MappedPages;
pub(super) use scheme::SCHEME;
pub use start::find_stream;

/// A file that a snapshot was written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotFile {
    pub(crate) path: std::path::PathBuf,
    pub(crate) starts_at: u64,
}

/// Keeps a snapshot's file from being written to while it is to be the base of another.
#[derive(Debug)]
pub(crate) struct HeldFile {
    _file: file::MappedFile,
}

impl SnapshotFile {
    /// # Errors
    /// The file is not there any more, or somebody writes to it.
    pub(crate) fn hold(&self) -> std::io::Result<HeldFile> {
        Ok(HeldFile { _file: file::MappedFile::to_read(&self.path, self.starts_at)? })
    }
}

/// Most threads that read or write pages, where nobody says how many.
const MAX_THREADS: usize = 4;

/// Number of threads for pages: as configured, or one for each core.
fn threads(asked: u8) -> usize {
    match asked {
        0 => std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS),
        asked => asked.into(),
    }
}
