//! Pure data about guest RAM: blocks, bitmaps, runs and batches of pages.
//!
//! Nothing here touches memory, a file or a socket. What is inside a block's bounds is decided in one
//! place, [`RamBlockTable::admit`]; everything that reads or writes guest RAM takes its [`Landing`].

mod abilities;
mod atomic_bitmap;
mod batch;
mod bitmap;
mod block;
mod dirty_map;
mod fingerprints;
mod page_set;
mod run;
mod table;

pub use abilities::{MoverAbilities, RoundKind};
pub use atomic_bitmap::{AtomicBitmap, ReceivedMap};
pub use batch::{PageBatch, Piece, Verdict};
pub use bitmap::PageBitmap;
pub(crate) use bitmap::page_bits;
pub use block::{BlockError, BlockFlags, BlockName, RamBlock};
pub use dirty_map::{ClearShift, DirtyMap};
pub use fingerprints::Fingerprints;
pub use page_set::PageSet;
pub use run::PageRun;
#[cfg(test)]
pub(crate) use table::ADMISSIONS;
pub use table::{Landing, MAX_BLOCKS, RamBlockTable, Refusal, TableError};
