//! The demo's RAM blocks: both processes create the same ones.

use std::fmt;
use std::str::FromStr;

use ramwire::guest::MappedGuest;
use ramwire::ram::{BlockName, RamBlock};
use ramwire::sys::Mapping;
use ramwire::units::PageSize;

/// A block: `LENGTH:PAGE`, both in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockSpec {
    length: u64,
    page: PageSize,
}

impl fmt::Display for BlockSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.length, self.page.bytes())
    }
}

impl FromStr for BlockSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once(':').and_then(|(l, p)| Some((l.parse().ok()?, p.parse().ok()?)));
        let (length, page) = parts.ok_or_else(|| format!("{text:?} is not LENGTH:PAGE"))?;
        Self::new(length, page)
    }
}

impl BlockSpec {
    fn new(length: u64, page: u64) -> Result<Self, String> {
        let size = PageSize::from_bytes(page).filter(|size| *size >= PageSize::SIZE_4K);
        let page = size.ok_or_else(|| format!("{page} is no page size of this machine; use 4K, 2M or 1G"))?;
        if length == 0 || !PageSize::SIZE_4K.divides(length) {
            return Err(format!("a block of {length} bytes is not made of 4 KiB pages"));
        }
        Ok(Self { length, page })
    }

    /// True for pages that are reserved separately from other memory.
    pub(super) fn is_reserved(&self) -> bool {
        self.page != PageSize::SIZE_4K
    }

    /// Bytes.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The first block of `ram` bytes over pages of `hugepages`, the others over plain ones.
    pub(super) fn list(ram: u64, hugepages: u64, others: &[u64]) -> Result<Vec<Self>, String> {
        let others = others.iter().map(|length| Self::new(*length, PageSize::SIZE_4K.bytes()));
        std::iter::once(Self::new(ram, hugepages)).chain(others).collect()
    }

    /// Fresh zero memory for `blocks`: shared, or private if `huge_pages` are requested in addition to those of
    /// hugetlbfs.
    pub(super) fn memory(
        blocks: &[Self],
        huge_pages: bool,
    ) -> Result<MappedGuest, Box<dyn std::error::Error>> {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for (index, block) in blocks.iter().enumerate() {
            let name = format!("demo.ram{index}");
            let mapping = match block.page {
                PageSize::SIZE_4K if huge_pages => Mapping::private(block.length, true)?,
                PageSize::SIZE_4K => Mapping::memfd(&name, block.length)?,
                page => Mapping::memfd_huge(&name, block.length, page)?,
            };
            builder = builder.mapping(RamBlock::new(BlockName::new(&name)?, block.length), &mapping);
        }
        Ok(builder.build()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_written_and_read_the_same() {
        let blocks = BlockSpec::list(1 << 30, 2 << 20, &[12288]).unwrap_or_default();
        assert_eq!(
            blocks.iter().map(ToString::to_string).collect::<Vec<_>>(),
            ["1073741824:2097152", "12288:4096"]
        );
        assert!(blocks.iter().all(|block| block.to_string().parse() == Ok(*block)));
        for wrong in ["", "1", "x:4096", "0:4096", "5000:4096", "4096:3000", "4096:1024"] {
            assert!(wrong.parse::<BlockSpec>().is_err(), "{wrong}");
        }
    }
}
