//! Numbers with units, so that a page number can't be mistaken for a byte offset.
//!
//! All conversions between the units are here; they fail instead of wrapping.

use std::fmt;
use std::time::Duration;

/// Position of a RAM block in its [`RamBlockTable`](crate::ram::RamBlockTable).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockIndex(pub u32);

impl BlockIndex {
    /// The index as a position in a slice.
    pub fn as_usize(self) -> usize {
        self.0 as usize
    }
}

/// Position of a target page inside its RAM block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageIndex(pub u64);

/// Distance from the start of a RAM block, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockOffset(pub u64);

/// Address in the guest's physical address space, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestAddr(pub u64);

impl fmt::Display for BlockOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl fmt::Display for GuestAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Page size in bytes; a power of two from 1 KiB to 1 GiB by construction.
///
/// The lower end keeps the flag bits of a RAM record (below 0x400) apart from its offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageSize {
    shift: u8,
}

impl PageSize {
    /// 4 KiB, the target page of x86.
    pub const SIZE_4K: Self = Self { shift: 12 };
    /// 2 MiB, the smaller huge page of x86.
    pub const SIZE_2M: Self = Self { shift: 21 };
    /// 1 GiB, the larger huge page of x86.
    pub const SIZE_1G: Self = Self { shift: 30 };

    /// `None` unless `bytes` is a power of two in `1 KiB..=1 GiB`.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        if bytes >= 1 << 10 && bytes <= 1 << 30 && bytes.is_power_of_two() {
            Some(Self { shift: bytes.trailing_zeros() as u8 })
        } else {
            None
        }
    }

    /// Bytes in one page.
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// log2 of [`bytes`](Self::bytes).
    pub const fn shift(self) -> u32 {
        self.shift as u32
    }

    /// The only conversion from pages to bytes. `None` if the result exceeds `u64`.
    pub const fn offset_of(self, page: PageIndex) -> Option<BlockOffset> {
        match page.0.checked_mul(self.bytes()) {
            Some(bytes) => Some(BlockOffset(bytes)),
            None => None,
        }
    }

    /// The page that holds `offset`.
    pub const fn page_of(self, offset: BlockOffset) -> PageIndex {
        PageIndex(offset.0 >> self.shift)
    }

    /// Pages needed to hold `bytes`; the last one may be partial.
    pub const fn pages_in(self, bytes: u64) -> u64 {
        (bytes >> self.shift) + if bytes & (self.bytes() - 1) != 0 { 1 } else { 0 }
    }

    /// True if `bytes` is a multiple of the page size.
    pub const fn divides(self, bytes: u64) -> bool {
        bytes & (self.bytes() - 1) == 0
    }
}

impl fmt::Display for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shift {
            30.. => write!(f, "{} GiB", 1u64 << (self.shift - 30)),
            20.. => write!(f, "{} MiB", 1u64 << (self.shift - 20)),
            _ => write!(f, "{} KiB", 1u64 << (self.shift - 10)),
        }
    }
}

/// Bytes per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

impl Rate {
    /// `bytes` a second as a limit, where 0 is none.
    pub fn limit(bytes: u64) -> Option<Self> {
        (bytes > 0).then_some(Self(bytes))
    }

    /// The average of `bytes` moved in `took`; `None` if no time passed.
    pub fn of(bytes: u64, took: Duration) -> Option<Self> {
        let nanos = took.as_nanos();
        if nanos == 0 {
            return None;
        }
        let rate = u128::from(bytes) * 1_000_000_000 / nanos;
        Some(Self(u64::try_from(rate).unwrap_or(u64::MAX)))
    }

    /// Bytes that fit into `time` at this rate.
    pub fn bytes_in(self, time: Duration) -> u64 {
        let bytes = u128::from(self.0) * time.as_nanos() / 1_000_000_000;
        u64::try_from(bytes).unwrap_or(u64::MAX)
    }

    /// How long `bytes` take at this rate; `None` if the rate is zero.
    pub fn time_for(self, bytes: u64) -> Option<Duration> {
        if self.0 == 0 {
            return None;
        }
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.0);
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

/// A share of a hundred, 0 to 100 by construction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Percent(u8);

impl Percent {
    /// `None` above 100.
    pub const fn new(value: u8) -> Option<Self> {
        if value <= 100 { Some(Self(value)) } else { None }
    }

    /// The number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// How long a vCPU rests for the time it runs, in percent of that time: 100 rests as long as it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct RestShare(u16);

impl RestShare {
    /// 99 times as long as it runs: a hundredth of the time is left.
    pub const MAX: Self = Self(9900);

    /// At most [`MAX`](Self::MAX).
    pub const fn new(percent: u16) -> Self {
        if percent > Self::MAX.0 { Self::MAX } else { Self(percent) }
    }

    /// The number.
    pub const fn percent_of_run(self) -> u16 {
        self.0
    }

    /// How long to rest after `ran`.
    pub fn after(self, ran: Duration) -> Duration {
        ran * u32::from(self.0) / 100
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_powers_of_two_between_1_kib_and_1_gib() {
        for (bytes, ok) in [(0, false), (512, false), (1024, true), (4096, true), (4097, false)] {
            assert_eq!(PageSize::from_bytes(bytes).is_some(), ok, "{bytes}");
        }
        assert_eq!(PageSize::from_bytes(1 << 30), Some(PageSize::SIZE_1G));
        assert_eq!(PageSize::from_bytes(1 << 31), None);
    }

    #[test]
    fn conversions_fail_instead_of_wrapping() {
        assert_eq!(PageSize::SIZE_4K.offset_of(PageIndex(2)), Some(BlockOffset(8192)));
        assert_eq!(PageSize::SIZE_4K.offset_of(PageIndex(1 << 60)), None);
        assert_eq!(PageSize::SIZE_4K.pages_in(u64::MAX), 1 << 52);
        assert_eq!(PageSize::SIZE_4K.pages_in(4097), 2);
    }

    #[test]
    fn rates_saturate_and_refuse_zero() {
        assert_eq!(Rate::of(1, Duration::ZERO), None);
        assert_eq!(Rate::of(1000, Duration::from_secs(1)), Some(Rate(1000)));
        assert_eq!(Rate(u64::MAX).bytes_in(Duration::from_secs(10)), u64::MAX);
        assert_eq!(Rate(0).time_for(1), None);
        assert_eq!(Rate(1000).time_for(500), Some(Duration::from_millis(500)));
    }
}
