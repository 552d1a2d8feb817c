//! Keys that the source was granted, and chunks that may have changed.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{DestinationHooks, REGISTERED_FACTOR, RoundSummary};
use crate::blocks::{BlockError, RamBlock};
use crate::chunk::{CHUNK_BYTES, chunk_of, chunk_range, chunks_in};
use crate::control::{Compress, Kind, RegisterRecord, RegisterResult};
use crate::fabric::{Access, AddressBase, FabricError, Registration};
use crate::hooks::HooksError;
use crate::region::HostRegion;

/// A key granted for some chunks.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    chunks: u64,
    block_base: u64,
    registration: Arc<Registration>,
}

/// Keys granted for one block.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// By first chunk.
    pub(super) spans: BTreeMap<u64, Grant>,
    /// The whole block, with pin-all.
    pub(super) whole: Option<Registration>,
    /// One bit per chunk that was ever granted or zeroed.
    pub(super) touched: Vec<u64>,
}

impl DestinationHooks {
    /// Registers memory for the source to write to; the wire's addresses are offsets in the block.
    pub(super) fn register(&mut self, region: &HostRegion, offset: u64) -> Result<Registration, HooksError> {
        let announced: u64 = self.blocks.announced().iter().map(|block| block.region.len()).sum();
        let (asked, limit) =
            (self.registered_bytes.saturating_add(region.len()), announced.saturating_mul(REGISTERED_FACTOR));
        if asked > limit {
            return Err(HooksError::TooMuchRegistered { asked, limit });
        }
        let register = || {
            let endpoint = self.stream.channel.endpoint();
            endpoint.register(region, &[Access::RemoteWrite], AddressBase::At(offset))
        };
        // Key 0 means "no key" on the wire. If a device returns it, keep that registration and make another.
        let first = register()?;
        let registration = if first.rkey == 0 { register()? } else { first };
        if registration.rkey == 0 {
            return Err(FabricError::Unavailable {
                what: "the device gives out only key 0",
                remedy: "use another device",
                source: std::io::ErrorKind::InvalidData.into(),
            }
            .into());
        }
        self.registered_bytes = asked;
        self.stream.channel.counters.registered(&registration);
        Ok(registration)
    }

    /// The block with this index; granted blocks exist only after the tables are exchanged.
    pub(super) fn granted_block(&self, index: u32) -> Result<&RamBlock, HooksError> {
        let block = self.blocks.get(index)?;
        match self.grants.get(index as usize) {
            Some(_) => Ok(block),
            None => Err(HooksError::unexpected(Kind::RegisterRequest, "the block tables were due")),
        }
    }

    pub(super) fn grant(
        &mut self,
        record: &RegisterRecord,
        summary: &mut RoundSummary,
    ) -> Result<RegisterResult, HooksError> {
        let block = self.granted_block(record.block)?;
        let length = block.region.len();
        block.range(record.key, 1)?;
        let first = chunk_of(record.key);
        let out_of_block = || BlockError::OutOfBlock {
            block: block.name.clone(),
            offset: record.key,
            len: record.extra_chunks.saturating_mul(CHUNK_BYTES),
            length,
        };
        // A span that extends beyond the block is cut at the block's end; one with an impossible size is refused.
        let count = record.extra_chunks.checked_add(1).ok_or_else(out_of_block)?;
        let range = chunk_range(length, first, count).ok_or_else(out_of_block)?;
        let count = chunks_in(range.end) - first;
        let region = block.part(range.clone())?;
        summary.registrations += 1;
        let index = record.block as usize;
        if let Some(existing) = self.existing_key(index, first, count) {
            return Ok(existing);
        }
        let registration = self.register(&region, range.start)?;
        summary.registered_bytes += region.len();
        // A device that cannot use an address of our choice uses the process's addresses.
        let block_base = registration.address.wrapping_sub(range.start);
        let rkey = registration.rkey;
        self.touch(index, length, first, count);
        let granted = Grant { chunks: count, block_base, registration: Arc::new(registration) };
        self.grants[index].spans.insert(first, granted);
        Ok(RegisterResult { rkey, block_base })
    }

    /// A key that already covers the chunks, or that was granted for the same first chunk before.
    pub(super) fn existing_key(&mut self, index: usize, first: u64, count: u64) -> Option<RegisterResult> {
        let grants = self.grants.get_mut(index)?;
        if let Some(whole) = &grants.whole {
            return Some(RegisterResult { rkey: whole.rkey, block_base: whole.address });
        }
        let (&start, grant) = grants.spans.range(..=first).next_back()?;
        let result = RegisterResult { rkey: grant.registration.rkey, block_base: grant.block_base };
        if start == first {
            return Some(result);
        }
        if start + grant.chunks < first.checked_add(count)? {
            return None;
        }
        let rest = Grant { chunks: start + grant.chunks - first, ..grant.clone() };
        grants.spans.insert(first, rest);
        Some(result)
    }

    pub(super) fn revoke(
        &mut self,
        record: &RegisterRecord,
        summary: &mut RoundSummary,
    ) -> Result<(), HooksError> {
        let name = self.granted_block(record.block)?.name.clone();
        let missing = HooksError::NotRegistered { block: name, chunk: record.key };
        let spans = &mut self.grants[record.block as usize].spans;
        let grant = spans.remove(&record.key).ok_or(missing)?;
        summary.unregistrations += 1;
        self.stream.channel.counters.unregistrations += 1;
        if let Ok(last) = Arc::try_unwrap(grant.registration) {
            self.registered_bytes -= last.len;
        }
        Ok(())
    }

    pub(super) fn zero(&mut self, range: &Compress, summary: &mut RoundSummary) -> Result<(), HooksError> {
        let block = self.granted_block(range.block)?;
        let bytes = block.range(range.key, range.length)?;
        let (region, length) = (block.part(bytes.clone())?, block.region.len());
        // In range: the region was cut to it just now.
        let _ = region.zero(0, range.length);
        if !bytes.is_empty() {
            let first = chunk_of(bytes.start);
            let chunks = chunk_of(bytes.end - 1) - first + 1;
            self.touch(range.block as usize, length, first, chunks);
        }
        summary.zero_ranges += 1;
        summary.zero_bytes += range.length;
        self.stream.channel.counters.zero_ranges += 1;
        self.stream.channel.counters.zero_bytes += range.length;
        Ok(())
    }

    /// Chunks of a block of `length` bytes may change from now on.
    pub(super) fn touch(&mut self, index: usize, length: u64, first: u64, count: u64) {
        let fresh = mark(&mut self.grants[index].touched, first, count);
        let last = first + count == chunks_in(length);
        let cut = if last && fresh > 0 { chunks_in(length) * CHUNK_BYTES - length } else { 0 };
        self.touched_bytes.fetch_add((fresh * CHUNK_BYTES).saturating_sub(cut), Ordering::Relaxed);
    }
}

/// Returns how many were not marked before.
pub(super) fn mark(words: &mut Vec<u64>, first: u64, count: u64) -> u64 {
    let end = (first + count) as usize;
    if words.len() * 64 < end {
        words.resize(end.div_ceil(64), 0);
    }
    let mut fresh = 0;
    for chunk in first as usize..end {
        let (word, bit) = (&mut words[chunk / 64], 1 << (chunk % 64));
        fresh += u64::from(*word & bit == 0);
        *word |= bit;
    }
    fresh
}
