//! Keys for writes: requested chunk by chunk, ahead of a walk, or for everything at once.

use super::SourceHooks;
use crate::blocks::{BlockError, check_records};
use crate::chunk::{AllBusy, CHUNK_BYTES, Run, SpanId, chunk_of, chunk_range};
use crate::control::{MAX_KEY_BATCH, Message, RegisterRecord, RegisterResult};
use crate::fabric::{Access, AddressBase, Registration};
use crate::hooks::{BlockSpan, HooksError, PageContent};
use crate::stop::Stop;

/// A whole block registered at both ends.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) local: Registration,
    rkey: u32,
    base: u64,
}

/// What a write needs besides the bytes' place in the block.
pub(super) struct Keys {
    pub(super) lkey: u32,
    pub(super) from: u64,
    pub(super) rkey: u32,
    pub(super) to: u64,
    pub(super) span: Option<SpanId>,
}

/// Adjacent chunks for which a key is needed.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    block: u32,
    first: u64,
    count: u64,
}

impl Wanted {
    fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// A request for keys that is in flight.
#[derive(Debug)]
pub(super) struct Asked {
    block: u32,
    first: u64,
    count: u64,
    /// This end's registration of the same chunks.
    local: Registration,
}

impl SourceHooks {
    pub(super) fn remote_label(&self, block: u32) -> u64 {
        self.remote.get(block as usize).map_or(0, |record| record.label)
    }

    /// The keys for a run inside one chunk; requests them from the destination if there are none yet.
    pub(super) fn keys(&mut self, run: &Run, stop: &Stop) -> Result<Keys, HooksError> {
        if let Some(pinned) = self.pinned.get(run.block as usize) {
            return Ok(Keys {
                lkey: pinned.local.lkey,
                from: pinned.local.address + run.range.start,
                rkey: pinned.rkey,
                to: pinned.base + run.range.start,
                span: None,
            });
        }
        let chunk = chunk_of(run.range.start);
        let id = match self.spans.find(run.block, chunk) {
            Some(id) => id,
            None => self.register(run.block, chunk, stop)?,
        };
        let span = self.spans.get(id).ok_or(HooksError::OutOfOrder("a registration vanished"))?;
        Ok(Keys {
            lkey: span.local.lkey,
            from: span.local.address + (run.range.start - span.first * CHUNK_BYTES),
            rkey: span.rkey,
            to: span.base + run.range.start,
            span: Some(id),
        })
    }

    /// Announces which pages will be saved next. If the destination supports it, one message requests all keys that
    /// these pages lack, instead of one message for each. Otherwise, and for pages not known to be data, nothing
    /// happens.
    ///
    /// # Errors
    ///
    /// As [`control_save_page`](Self::control_save_page).
    pub fn expect_pages(&mut self, spans: &[BlockSpan], stop: &Stop) -> Result<(), HooksError> {
        let batches = self.granted.extension.is_some_and(|extension| extension.features.key_batches);
        if !batches || self.postcopy || self.granted.pin_all {
            return Ok(());
        }
        self.enter_round(stop)?;
        self.wait_for_keys_ahead(stop)?;
        let mut wanted: Vec<Wanted> = Vec::new();
        for span in spans.iter().filter(|span| span.content == PageContent::Data && span.len > 0) {
            let count = self.blocks.len();
            let missing = BlockError::NoSuchIndex { index: span.block, count };
            let range = self.blocks.get(span.block as usize).ok_or(missing)?.range(span.offset, span.len)?;
            for chunk in chunk_of(range.start)..=chunk_of(range.end - 1) {
                if self.spans.find(span.block, chunk).is_none() {
                    self.want(&mut wanted, span.block, chunk);
                }
            }
        }
        // A single key is requested on demand, and a walk requests its next span ahead.
        if wanted.len() > 1 { self.register_all(wanted, stop) } else { Ok(()) }
    }

    /// Adds a chunk to the wanted spans: to the last span if it is adjacent, otherwise as a new span.
    fn want(&self, wanted: &mut Vec<Wanted>, block: u32, chunk: u64) {
        let most = self.spans.max_chunks();
        if let Some(last) = wanted.last_mut().filter(|last| last.block == block) {
            if (last.first..last.end()).contains(&chunk) {
                return;
            }
            if last.end() == chunk && last.count < most {
                last.count += 1;
                return;
            }
        }
        if wanted.len() < MAX_KEY_BATCH {
            wanted.push(Wanted { block, first: chunk, count: 1 });
        }
    }

    /// Requests all these keys in one message. Those that do not fit the pin budget are requested later, on demand.
    fn register_all(&mut self, mut wanted: Vec<Wanted>, stop: &Stop) -> Result<(), HooksError> {
        // Pages out of address order may need a chunk twice.
        wanted.sort_unstable_by_key(|wanted| (wanted.block, wanted.first));
        wanted.dedup_by(|next, last| last.block == next.block && next.first < last.end());
        let mut left = self.config.pin_budget_bytes.map_or(u64::MAX, |budget| budget / 2);
        wanted.retain(|wanted| {
            let bytes = self.spans.bytes_of(wanted.block, wanted.first, wanted.count);
            let fits = bytes <= left;
            left -= if fits { bytes } else { 0 };
            fits
        });
        let bytes = wanted.iter().map(|wanted| self.spans.bytes_of(wanted.block, wanted.first, wanted.count));
        let bytes = bytes.sum();
        if wanted.is_empty() {
            return Ok(());
        }
        self.make_room(bytes, stop)?;
        let records = wanted.iter().map(|wanted| self.record(wanted)).collect();
        self.main.send(&Message::RegisterRequest(records), stop)?;
        // This end registers while the peer does.
        let mut asked = Vec::with_capacity(wanted.len());
        for wanted in &wanted {
            asked.push(self.register_here(wanted)?);
        }
        let results = match self.reply(stop)? {
            Message::RegisterResult { results, .. } => results,
            other => return Err(HooksError::unexpected(other.kind(), "waiting for keys")),
        };
        // Fewer answers than requests read as "no key".
        let answers = results.into_iter().chain(std::iter::repeat(RegisterResult::default()));
        for (asked, result) in asked.into_iter().zip(answers) {
            self.take_key(asked, result)?;
        }
        Ok(())
    }

    fn register(&mut self, block: u32, chunk: u64, stop: &Stop) -> Result<SpanId, HooksError> {
        self.wait_for_keys_ahead(stop)?;
        if let Some(id) = self.spans.find(block, chunk) {
            return Ok(id);
        }
        let count = self.spans.plan(block, chunk);
        self.make_room(self.spans.bytes_of(block, chunk, count), stop)?;
        let asked = self.ask(block, chunk, count, stop)?;
        let reply = self.reply(stop)?;
        self.take_keys(asked, reply)
    }

    /// Requests the next span while the current one is being written, so that a walk in address order never waits for
    /// keys. It does so only after the walk has continued at least once, with a credit available and room in the pin
    /// budget.
    pub(super) fn ask_ahead(&mut self, id: SpanId, chunk: u64, stop: &Stop) -> Result<(), HooksError> {
        let Some(span) = self.spans.get(id) else { return Ok(()) };
        let (block, next) = (span.block, span.first + span.chunks);
        let is_late = span.chunks >= 2 && chunk >= span.first + span.chunks / 2;
        if !is_late
            || self.asked.is_some()
            || !self.main.has_credit()
            || !self.spans.continues_at(block, next)
        {
            return Ok(());
        }
        let count = self.spans.plan(block, next);
        if self.spans.victim(self.spans.bytes_of(block, next, count)) == Ok(None) {
            self.asked = Some(self.ask(block, next, count, stop)?);
        }
        Ok(())
    }

    /// Takes keys that were requested ahead, if they have arrived.
    pub(super) fn take_keys_ahead(&mut self) -> Result<(), HooksError> {
        if self.asked.is_some()
            && let Some(reply) = self.main.take_reply()
            && let Some(asked) = self.asked.take()
        {
            self.take_keys(asked, reply)?;
        }
        Ok(())
    }

    /// Answers come in order: that to the request sent ahead comes first.
    pub(super) fn wait_for_keys_ahead(&mut self, stop: &Stop) -> Result<(), HooksError> {
        if let Some(asked) = self.asked.take() {
            let reply = self.reply(stop)?;
            self.take_keys(asked, reply)?;
        }
        Ok(())
    }

    fn ask(&mut self, block: u32, chunk: u64, count: u64, stop: &Stop) -> Result<Asked, HooksError> {
        let wanted = Wanted { block, first: chunk, count };
        self.main.send(&Message::RegisterRequest(vec![self.record(&wanted)]), stop)?;
        // This end registers while the peer does.
        self.register_here(&wanted)
    }

    fn record(&self, wanted: &Wanted) -> RegisterRecord {
        let key = self.remote_label(wanted.block) + wanted.first * CHUNK_BYTES;
        RegisterRecord { key, block: wanted.block, extra_chunks: wanted.count - 1 }
    }

    /// This end's registration of chunks that were requested.
    fn register_here(&mut self, wanted: &Wanted) -> Result<Asked, HooksError> {
        let &Wanted { block, first, count } = wanted;
        let ram = &self.blocks[block as usize];
        let range = chunk_range(ram.region.len(), first, count);
        let region = ram.part(range.ok_or(HooksError::OutOfOrder("a chunk past its block"))?)?;
        let endpoint = self.main.channel.endpoint();
        let local = endpoint.register(&region, &[Access::Read], AddressBase::Host)?;
        self.main.channel.counters.registered(&local);
        Ok(Asked { block, first, count, local })
    }

    fn take_keys(&mut self, asked: Asked, reply: Message<'_>) -> Result<SpanId, HooksError> {
        match reply {
            Message::RegisterResult { results, .. } => {
                self.take_key(asked, results.first().copied().unwrap_or_default())
            }
            other => Err(HooksError::unexpected(other.kind(), "waiting for a key")),
        }
    }

    fn take_key(&mut self, asked: Asked, result: RegisterResult) -> Result<SpanId, HooksError> {
        let Asked { block, first, count, local } = asked;
        let ram = &self.blocks[block as usize];
        let (name, length) = (|| ram.name.clone(), ram.region.len());
        if result.rkey == 0 {
            return Err(HooksError::NoKey { block: name(), chunk: first });
        }
        if result.block_base.checked_add(length).is_none() {
            let base = result.block_base;
            return Err(BlockError::Wraps { name: name(), base, label: 0, length }.into());
        }
        Ok(self.spans.insert(block, first, count, result.rkey, result.block_base, local))
    }

    /// Unregisters spans until `bytes` more fit the pin budget.
    fn make_room(&mut self, bytes: u64, stop: &Stop) -> Result<(), HooksError> {
        loop {
            match self.spans.victim(bytes) {
                Ok(None) => return Ok(()),
                Ok(Some(id)) => self.unregister(id, stop)?,
                Err(AllBusy) => {
                    let queue = self.busiest();
                    self.ring()?;
                    if !self.pump()? {
                        self.rest(queue, stop)?;
                    }
                }
            }
        }
    }

    fn unregister(&mut self, id: SpanId, stop: &Stop) -> Result<(), HooksError> {
        let Some(span) = self.spans.remove(id) else { return Ok(()) };
        let record = RegisterRecord { key: span.first, block: span.block, extra_chunks: 0 };
        self.main.send(&Message::UnregisterRequest(vec![record]), stop)?;
        drop(span);
        self.main.channel.counters.unregistrations += 1;
        match self.reply(stop)? {
            Message::UnregisterFinished { .. } => Ok(()),
            other => Err(HooksError::unexpected(other.kind(), "giving a key back")),
        }
    }

    fn reply(&mut self, stop: &Stop) -> Result<Message<'static>, HooksError> {
        let reply = self.main.reply(stop)?;
        self.settle();
        Ok(reply)
    }

    pub(super) fn exchange_blocks(&mut self, stop: &Stop) -> Result<(), HooksError> {
        self.main.send(&Message::RamBlocksRequest, stop)?;
        let mut locals = Vec::new();
        if self.granted.pin_all {
            for block in &self.blocks {
                let endpoint = self.main.channel.endpoint();
                let local = endpoint.register(&block.region, &[Access::Read], AddressBase::Host)?;
                self.main.channel.counters.registered(&local);
                locals.push(local);
            }
        }
        let records = match self.reply(stop)? {
            Message::RamBlocksResult(records) => records,
            other => return Err(HooksError::unexpected(other.kind(), "waiting for the block table")),
        };
        check_records(&self.blocks, &records)?;
        for (index, local) in locals.into_iter().enumerate() {
            let (rkey, base) = (records[index].rkey, records[index].base);
            if rkey == 0 {
                return Err(HooksError::NoKey { block: self.blocks[index].name.clone(), chunk: 0 });
            }
            self.pinned.push(Pinned { local, rkey, base });
        }
        self.remote = records;
        Ok(())
    }
}
