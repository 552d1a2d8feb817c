//! Where the pages are read of a guest that runs already.

use std::io;

use crate::units::BlockIndex;

/// Memory at rest, whose pages are read in any order, by several threads side by side.
pub trait PageSupply: Send + Sync {
    /// Fills `into` with the contents of a block from `offset` bytes on. What it has nothing of is zero.
    ///
    /// # Errors
    /// The bytes could not be read; they may be asked for again.
    fn read(&self, block: BlockIndex, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// What errors call it.
    fn name(&self) -> String;
}
