//! Fingerprints at the destination: those of the source compared with those of the placed pages.
//!
//! The source sends its fingerprints after each round, when all its pages are in place. A page that differs then is a
//! suspect: most were written by the guest meanwhile, and are sent again with another fingerprint. A page that is still
//! a suspect when everything has arrived is compared once more, and refused if its memory is not what was sent last.

use std::sync::Arc;
use std::time::Duration;

use crate::error::Chain;
use crate::guest::{GuestMemory, Placer};
use crate::ram::{BlockName, Fingerprints, PageRun, PageSet, RamBlockTable};
use crate::session::digest::Mismatch;
use crate::session::fingerprints::{MemoryCheck, of_memory};
use crate::session::{Breakage, Error};
use crate::stream::native::{Finding, Order, STATE_BLOCK};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::incoming::{Event, Step};
use crate::sys::{RecvPart, Stop};
use crate::units::{BlockIndex, BlockOffset, PageIndex};

use super::DestinationSession;
use super::reader::StreamReader;
use super::receive::out_of_turn;
use crate::session::digest::carried;

/// The source needs at most this for so many bytes of RAM to compare them with what it has sent.
const COMPARE_BYTES: u64 = 64 << 20;

/// The fingerprints that the source has sent, and the pages that differ here.
#[derive(Debug, Default)]
pub(super) struct Compared {
    /// Both ends have agreed: those of the pages here are made from the first one on.
    agreed: bool,
    prints: Option<Arc<Fingerprints>>,
    /// The source's of pages that differ, by the guest's own table.
    theirs: Vec<Vec<u64>>,
    suspects: PageSet,
    /// The source's of configuration and device state.
    state: Option<[u64; 2]>,
    verified: bool,
    /// What the source has found in its memory.
    pub(super) check: Option<MemoryCheck>,
}

impl Compared {
    /// HELLO has come.
    pub(super) fn agree(&mut self, agreed: bool) {
        self.agreed = agreed;
    }

    /// The memory is there, and no page has come.
    pub(super) fn begin(
        &mut self,
        table: &RamBlockTable,
        key: Option<[u8; 16]>,
    ) -> Option<Arc<Fingerprints>> {
        let key = key.filter(|_| self.agreed)?;
        self.prints = Some(Arc::new(Fingerprints::new(table, key)));
        self.suspects = PageSet::new(table);
        self.theirs = vec![Vec::new(); table.blocks().len()];
        self.prints.clone()
    }

    /// The end of the stream will come again.
    pub(super) fn forget_switchover(&mut self) {
        (self.state, self.verified) = (None, false);
    }

    /// All that was sent is here.
    pub(super) fn verified(&self) -> bool {
        self.verified
    }

    /// The source's of a run of pages that are in place. `past_stream`: they were written by a NIC, and are read again.
    fn take(
        &mut self,
        placer: &Placer,
        run: PageRun,
        values: &[u64],
        past_stream: bool,
    ) -> Result<(), Error> {
        let Some(prints) = self.prints.clone() else { return Err(not_agreed()) };
        let mut window = Vec::new();
        for (page, theirs) in (run.first.0..).map(PageIndex).zip(values) {
            let placed = prints.get(run.block, page).filter(|_| !past_stream);
            let ours = match placed {
                Some(ours) => ours,
                None => of_memory(&**placer.memory(), &prints, (run.block, page), &mut window)?,
            };
            let one = PageRun { block: run.block, first: page, pages: 1 };
            if ours == *theirs {
                self.suspects.remove(one);
            } else {
                self.suspect(placer.memory().table(), one, *theirs);
            }
        }
        Ok(())
    }

    fn suspect(&mut self, table: &RamBlockTable, page: PageRun, theirs: u64) {
        self.suspects.add(page);
        let block = page.block.as_usize();
        let (Some(of_block), Some(described)) = (self.theirs.get_mut(block), table.get(page.block)) else {
            return;
        };
        if of_block.is_empty() {
            of_block.resize(usize::try_from(table.pages_of(described)).unwrap_or(0), 0);
        }
        if let Some(slot) = usize::try_from(page.first.0).ok().and_then(|at| of_block.get_mut(at)) {
            *slot = theirs;
        }
    }

    /// Everything has arrived: compares again the pages that differed when their fingerprints arrived, except those
    /// whose bytes do not matter.
    fn settle(&mut self, memory: &dyn GuestMemory, unsent: &PageSet) -> Result<(), Error> {
        let Some(prints) = self.prints.clone() else { return Ok(()) };
        let (mut differs, mut window): (Option<PageRun>, _) = (None, Vec::new());
        for page in self.suspects.runs().flat_map(PageRun::each) {
            let theirs = self.theirs.get(page.block.as_usize());
            let theirs = theirs.and_then(|of_block| of_block.get(usize::try_from(page.first.0).ok()?));
            let ours = of_memory(memory, &prints, (page.block, page.first), &mut window)?;
            if unsent.contains(page.block, page.first) || theirs == Some(&ours) {
                continue;
            }
            match &mut differs {
                None => differs = Some(page),
                Some(run) if run.block == page.block && run.end() == page.first => run.pages += 1,
                Some(_) => break,
            }
        }
        let Some(run) = differs else { return Ok(()) };
        let table = memory.table();
        let block = table.get(run.block).map(|block| block.name.clone());
        let bytes = |page: PageIndex| page.0 * table.page().bytes();
        Err(Error::Digest(match block {
            Some(block) => Mismatch::Ram { block, from: BlockOffset(bytes(run.first)), to: bytes(run.end()) },
            None => Mismatch::State,
        }))
    }
}

impl DestinationSession {
    /// FINGERPRINTS.
    pub(super) fn fingerprints(&mut self, block: u32, first: u64, values: &[u8]) -> Result<(), Error> {
        let values: Vec<u64> =
            values.chunks_exact(8).filter_map(|v| v.try_into().ok().map(u64::from_be_bytes)).collect();
        if self.reported.compared.prints.is_none() {
            return Err(not_agreed());
        }
        if block == STATE_BLOCK {
            self.reported.compared.state = values.try_into().ok();
            return Ok(());
        }
        let past_stream = self.wire.link.abilities().has_rounds;
        let placer = Arc::clone(self.ingest.placing()?.placer());
        let landing = placer.admit_pages(BlockIndex(block), PageIndex(first), values.len() as u64)?;
        let Some(landing) = landing else { return Err(not_agreed()) };
        self.reported.compared.take(&placer, placer.run(landing), &values, past_stream)
    }

    /// Everything has come: is it what was sent?
    pub(super) fn compare_fingerprints(&mut self) -> Result<(), Error> {
        let Some(prints) = self.reported.compared.prints.clone() else { return Ok(()) };
        if self.breakage.is(Breakage::SkipFingerprints) {
            return Ok(());
        }
        let memory = self.ingest.memory()?;
        self.reported.compared.settle(&*memory, &self.reported.unsent)?;
        let Some(theirs) = self.reported.compared.state else {
            return Err(out_of_turn("STATE_SENT", "waiting for the fingerprint of the device state"));
        };
        let incoming = self.ingest.incoming();
        let carried = incoming
            .map(|i| carried(i.seen.framing, (&i.configuration, &i.vmm_configuration), &i.early_sections))
            .unwrap_or_default();
        if theirs != [prints.of(&carried), prints.of(self.ingest.state())] {
            return Err(Error::Digest(Mismatch::State));
        }
        self.reported.compared.verified = true;
        Ok(())
    }

    /// The guest runs here. Waits for what the source finds in its memory; nothing of this changes what runs where, and
    /// nothing is placed any more, whatever comes.
    pub(super) fn await_memory_check(&mut self, reader: &mut StreamReader) {
        let bytes: u64 = self.ingest.memory().map_or(0, |memory| memory.table().travelling());
        let time = self.settings.finish_timeout + Duration::from_secs(bytes / COMPARE_BYTES);
        self.wire.stop = Stop::never().within(time);
        let check = match self.next_finding(reader) {
            Ok(finding) => {
                let name = |block: &crate::ram::RamBlock| block.name.clone();
                let announced: Vec<BlockName> =
                    self.ingest.incoming().map(|i| i.blocks.iter().map(name).collect()).unwrap_or_default();
                match self.ingest.memory() {
                    Ok(memory) => MemoryCheck::of(finding, memory.table(), &announced),
                    Err(error) => MemoryCheck::NotMade { why: Chain(&error).to_string() },
                }
            }
            Err(error) => MemoryCheck::NotMade { why: Chain(&error).to_string() },
        };
        match &check {
            MemoryCheck::Differs { .. } => tracing::error!("{check}"),
            _ => tracing::info!("{check}"),
        }
        self.reported.compared.check = Some(check);
    }

    fn next_finding(&mut self, reader: &mut StreamReader) -> Result<Finding, Error> {
        loop {
            let StreamReader { stream, buffer, start, end, .. } = reader;
            match stream.next(&buffer[*start..*end])? {
                Step::Event { consumed, event } => {
                    let found = match event {
                        Event::Command(Command::Native(Order::MemoryCheck(finding))) => Some(finding),
                        Event::Command(Command::Ping(_)) => None,
                        _ => {
                            return Err(out_of_turn(
                                "something else",
                                "waiting for what the source finds in its memory",
                            ));
                        }
                    };
                    *start += consumed;
                    if let Some(found) = found {
                        return Ok(found);
                    }
                }
                Step::NeedMore { consumed, needed } => {
                    *start += consumed;
                    reader.make_room(needed);
                    let room = &mut reader.buffer[reader.end..];
                    let got = self.wire.link.stream().recv(&mut [RecvPart::Own(room)], &self.wire.stop)?;
                    if got == 0 {
                        return Err(Error::Truncated {
                            at: reader.at,
                            inside: "what the source finds in its memory",
                        });
                    }
                    reader.end += got;
                    reader.at += got as u64;
                    self.figures.stream(reader.at);
                }
            }
        }
    }
}

fn not_agreed() -> Error {
    out_of_turn("FINGERPRINTS", "none were agreed on, or there are no such pages")
}
