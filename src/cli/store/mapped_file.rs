//! A guest in a mapped-ram file, to be sent directly from the file.

use std::path::Path;
use std::sync::Arc;

use ramwire::guest::MappedGuest;
use ramwire::ram::RamBlock;
use ramwire::stream::qemu::file::Configuration;
use ramwire::stream::qemu::incoming::{Ending, Event, IncomingConfig, IncomingStream, SectionKind, Step};
use ramwire::stream::qemu::section::Phase;
use ramwire::transport::{Address, MappedDestination};
use ramwire::units::PageSize;

use super::incoming::{nothing, style_seen};
use super::{FORMAT, Manifest, State, StoredGuest};

/// The parts of a stream other than RAM.
#[derive(Default)]
struct OtherRecords {
    configuration: Configuration,
    /// Sections before the first page.
    early: Vec<u8>,
    /// Sections after it.
    state: Vec<u8>,
    pages_began: bool,
}

impl OtherRecords {
    fn take(&mut self, event: &Event<'_>, raw: &[u8]) {
        match event {
            Event::Configuration(configuration) => self.configuration = configuration.clone(),
            Event::SectionStart { kind: SectionKind::Ram, phase, .. } => {
                self.pages_began |= matches!(phase, Phase::Part | Phase::End);
            }
            Event::SectionStart { .. }
            | Event::SectionEnd {
                kind: SectionKind::DirtyBitmap | SectionKind::EarlyVirtioMem | SectionKind::NativeState,
                ..
            }
            | Event::VirtioMem(_)
            | Event::BitmapChunk
            | Event::SectionBytes(_) => {
                if self.pages_began { &mut self.state } else { &mut self.early }.extend_from_slice(raw);
            }
            _ => {}
        }
    }
}

impl StoredGuest {
    /// A guest in the file at `address`. There is no manifest: it can be sent any number of times. `no_vmdesc`: even if
    /// nothing proves that its device state is complete.
    ///
    /// # Errors
    /// Why it can't be read, or is incomplete.
    pub fn of_file(address: &Address, no_vmdesc: bool) -> Result<Self, Box<dyn std::error::Error>> {
        let file = MappedDestination::open(address)?;
        let config = IncomingConfig { adopt_page_size: true, ..IncomingConfig::default() };
        let mut stream = IncomingStream::new(config);
        let (bytes, mut at, mut others) = (&file.stream().bytes, 0, OtherRecords::default());
        let ending = loop {
            match stream.next(bytes.get(at..).unwrap_or_default())? {
                Step::Event { event: Event::Done, .. } => break Ending::Whole,
                Step::Event { consumed, event } => {
                    others.take(&event, bytes.get(at..at + consumed).unwrap_or_default());
                    at += consumed;
                }
                Step::NeedMore { .. } => break stream.finish()?,
            }
        };
        if ending == Ending::NoDescription && !no_vmdesc {
            let why = "its device state ended without a VM description; --no-vmdesc sends it anyway";
            return Err(format!("{address}: {why}").into());
        }
        let seen = *stream.seen();
        others.state.extend_from_slice(stream.tail().bytes());
        let page = others.configuration.page_size.unwrap_or(PageSize::SIZE_4K);
        let mut builder = MappedGuest::builder(page);
        for (index, places) in file.stream().places.iter().enumerate() {
            let mut block = RamBlock::new(places.block.name.clone(), places.block.used_length);
            block.guest_addr = places.block.guest_addr;
            let mapping = match file.map(index)? {
                Some(mapping) => mapping,
                None => {
                    block.flags.ignored = true;
                    nothing(&block, Path::new("."))?
                }
            };
            builder = builder.mapping(block, &mapping);
        }
        let manifest = Manifest {
            format: FORMAT,
            state: State::Whole,
            machine: others.configuration.machine.clone(),
            capabilities: others.configuration.capabilities.clone(),
            uuid: None,
            page_size: None,
            configuration: seen.framing.configuration,
            footers: seen.framing.footers,
            source: "file".into(),
            otherwise: None,
            passed: false,
            peer_style: style_seen(&others.configuration.machine, &seen),
            blocks: Vec::new(),
        };
        let memory = Arc::new(builder.build()?);
        Ok(Self {
            custody: None,
            manifest,
            memory,
            configuration: others.configuration,
            early: others.early,
            tail: others.state,
            _file: Some(file),
        })
    }
}
