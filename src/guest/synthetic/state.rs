//! The device state of the synthetic guest: its configuration, its blocks, and the count of each writer.
//!
//! | bytes | field (little endian) |
//! |-------|-----------------------|
//! | 8 | `ramguest` |
//! | 4 | length of the rest without the checksum |
//! | 8, 8, 8 | seed, working set in bytes, rate in bytes per second (all ones: no limit) |
//! | 4, 4 | share of zero pages in percent, target page in bytes |
//! | 8 | checksum over names and lengths of the blocks |
//! | 4, 8 each | writers, then the writes each has done |
//! | 8 | checksum over all before |

use std::hash::Hasher as _;
use std::io::{self, Read};

use twox_hash::XxHash3_64;

use super::plan::{MAX_WRITERS, SyntheticConfig};
use crate::ram::RamBlockTable;
use crate::units::{Percent, Rate};

const MAGIC: [u8; 8] = *b"ramguest";
/// Bytes between the length and the writers' counts.
const FIXED: usize = 8 * 3 + 4 * 2 + 8 + 4 + 4;
const NO_LIMIT: u64 = u64::MAX;

/// The blocks as a number, so that another guest's memory is refused instead of misread.
fn fingerprint(table: &RamBlockTable) -> u64 {
    let mut hash = XxHash3_64::new();
    for block in table.blocks() {
        hash.write(&[u8::from(block.flags.ignored)]);
        hash.write(block.name.as_str().as_bytes());
        hash.write(&block.used_length.to_le_bytes());
    }
    hash.finish()
}

pub(super) fn encode(table: &RamBlockTable, config: &SyntheticConfig, done: &[u64]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(((FIXED + 8 * done.len()) as u32).to_le_bytes());
    let rate = config.rate.map_or(NO_LIMIT, |rate| rate.0);
    [config.seed, config.working_set, rate].iter().for_each(|word| out.extend(word.to_le_bytes()));
    for word in [u32::from(config.zero.get()), table.page().bytes() as u32, config.changes] {
        out.extend(word.to_le_bytes());
    }
    out.extend(fingerprint(table).to_le_bytes());
    out.extend((done.len() as u32).to_le_bytes());
    done.iter().for_each(|done| out.extend(done.to_le_bytes()));
    out.extend(XxHash3_64::oneshot(&out).to_le_bytes());
    out
}

pub(super) fn decode(table: &RamBlockTable, from: &mut dyn Read) -> io::Result<(SyntheticConfig, Vec<u64>)> {
    let mut all = vec![0; 12];
    from.read_exact(&mut all)?;
    let (magic, length) = all.split_at(8);
    let length = length.first_chunk().map_or(0, |length| u32::from_le_bytes(*length)) as usize;
    if magic != MAGIC {
        return Err(refused("does not start with ramguest"));
    }
    if !(FIXED..=FIXED + 8 * MAX_WRITERS as usize).contains(&length) {
        return Err(refused("has a length that no state of up to 256 writers has"));
    }
    all.resize(12 + length + 8, 0);
    from.read_exact(&mut all[12..])?;
    let (body, sum) = all.split_at(12 + length);
    if sum != XxHash3_64::oneshot(body).to_le_bytes() {
        return Err(refused("has a wrong checksum"));
    }
    let mut fields = Fields(&body[12..]);
    let (seed, working_set, rate) = (fields.long()?, fields.long()?, fields.long()?);
    let (zero, page, changes) = (fields.short()?, fields.short()?, fields.short()?);
    if fields.long()? != fingerprint(table) || u64::from(page) != table.page().bytes() {
        return Err(refused("is of a guest with other RAM blocks"));
    }
    let writers = fields.short()?;
    let done = (0..writers.min(MAX_WRITERS)).map(|_| fields.long()).collect::<io::Result<Vec<_>>>()?;
    let zero = u8::try_from(zero).ok().and_then(Percent::new).ok_or_else(|| refused("has no percentage"))?;
    if writers == 0 || !fields.0.is_empty() || done.iter().any(|done| *done > u64::MAX / 2) {
        return Err(refused("counts its writers wrongly"));
    }
    let rate = (rate != NO_LIMIT).then_some(Rate(rate));
    Ok((SyntheticConfig { seed, zero, working_set, rate, writers, changes }, done))
}

struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk().ok_or_else(|| refused("ends early"))?;
        self.0 = rest;
        Ok(*head)
    }

    fn long(&mut self) -> io::Result<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn short(&mut self) -> io::Result<u32> {
        self.take().map(u32::from_le_bytes)
    }
}

fn refused(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the device state of the synthetic guest {why}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::PageSize;

    fn table(name: &str) -> RamBlockTable {
        let block = RamBlock::new(BlockName::new(name).unwrap(), 8192);
        RamBlockTable::new(PageSize::SIZE_4K, vec![block]).unwrap()
    }

    #[test]
    fn a_state_comes_back_and_any_flip_or_cut_is_refused() {
        let table = table("a");
        let config = SyntheticConfig { rate: None, writers: 3, ..SyntheticConfig::default() };
        let bytes = encode(&table, &config, &[1, 2, 3]);
        assert_eq!(decode(&table, &mut bytes.as_slice()).unwrap(), (config, vec![1, 2, 3]));
        for at in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[at] ^= 4;
            assert!(decode(&table, &mut wrong.as_slice()).is_err(), "byte {at}");
            assert!(decode(&table, &mut &bytes[..at]).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_state_of_other_blocks_is_refused() {
        let bytes = encode(&table("a"), &SyntheticConfig::default(), &[0, 0]);
        let error = decode(&table("b"), &mut bytes.as_slice()).unwrap_err();
        assert!(error.to_string().contains("other RAM blocks"), "{error}");
    }
}
