//! Streams made for a test.

use super::*;

/// A stream in the making.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Bytes {
    pub(super) fn new() -> Self {
        Self::of(&Configuration { machine: "none".into(), ..Configuration::default() })
    }

    pub(super) fn of(configuration: &Configuration) -> Self {
        let mut out = Vec::new();
        encode_header(&mut out);
        encode_configuration(configuration, &mut out);
        Self(out)
    }

    /// Header, START with a block `ram` of four pages and `vga` of one, and its end.
    pub(super) fn started() -> Self {
        Self::new().start().list(&[block("ram", 4), block("vga", 1)]).eos()
    }

    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn item(mut self, write: impl FnOnce(&mut Vec<u8>)) -> Self {
        write(&mut self.0);
        self
    }

    pub(super) fn head(self, phase: Phase, id: u32, idstr: &str, version: u32) -> Self {
        let name = SectionName { id, idstr, instance: 0, version };
        self.item(|out| match phase {
            Phase::Full => section::encode_full(&name, out),
            _ => section::encode_start(&name, out),
        })
    }

    pub(super) fn start(self) -> Self {
        self.head(Phase::Start, RAM, IDSTR, 4)
    }

    pub(super) fn part(self) -> Self {
        self.item(|out| section::encode_part(RAM, out))
    }

    pub(super) fn end(self) -> Self {
        self.item(|out| section::encode_end(RAM, out))
    }

    pub(super) fn list(self, blocks: &[BlockAnnouncement]) -> Self {
        self.item(|out| encode_block_list(blocks, out))
    }

    pub(super) fn record(self, record: Record<'_>) -> Self {
        self.item(|out| record.encode(out))
    }

    pub(super) fn zero(self, block: Option<&str>, offset: u64) -> Self {
        self.record(Record::Zero { at: at(block, offset), fill: 0 })
    }

    pub(super) fn footer(self, id: u32) -> Self {
        self.item(|out| section::encode_footer(id, out))
    }

    pub(super) fn eos(self) -> Self {
        self.raw(&EOS_RECORD).footer(RAM)
    }

    pub(super) fn command(self, command: Command<'_>) -> Self {
        self.item(|out| command.encode(out))
    }

    /// A device section, the end of file and a description that fits.
    pub(super) fn devices(self) -> Self {
        let json = br#"{"devices": [{"name": "timer", "instance_id": 0, "size": 3}]}"#;
        let this = self.head(Phase::Full, 9, "timer", 1).raw(b"abc").footer(9);
        this.item(section::encode_eof).item(|out| section::encode_vm_description(json, out))
    }
}

pub(super) fn block(name: &str, pages: u64) -> BlockAnnouncement {
    let name = BlockName::new(name).unwrap();
    BlockAnnouncement { name, used_length: pages * PAGE as u64, host_page: None, guest_addr: None }
}

pub(super) fn at(block: Option<&str>, offset: u64) -> PageAt<'_> {
    PageAt { block, offset: BlockOffset(offset) }
}

/// Events of a run over a whole stream.
#[derive(Debug, Default)]
pub(super) struct Told {
    pub(super) trace: Vec<String>,
    pub(super) done: bool,
}

pub(super) fn run_with(config: IncomingConfig, bytes: &[u8]) -> Result<(Told, IncomingStream), Corrupt> {
    let mut stream = IncomingStream::new(config);
    let (mut at, mut told) = (0, Told::default());
    loop {
        match stream.next(&bytes[at..]) {
            Ok(Step::Event { consumed, event }) => {
                at += consumed;
                told.done |= event == Event::Done;
                if told.done {
                    return Ok((told, stream));
                }
                told.trace.push(match event {
                    Event::Page { block, offset, .. } => format!("page {}:{offset}", block.0),
                    Event::Zero { block, offset } => format!("zero {}:{offset}", block.0),
                    Event::Filled { block, offset, byte } => format!("fill {}:{offset} {byte}", block.0),
                    Event::SectionStart { phase, kind, .. } => format!("{phase:?} {kind:?}"),
                    Event::RecordsEnd => "EOS".into(),
                    Event::SectionEnd { .. } => "end".into(),
                    Event::Command(command) => command.name().into(),
                    Event::TailBytes(bytes) => format!("tail {}", bytes.len()),
                    Event::SectionBytes(bytes) => format!("bytes {}", bytes.len()),
                    Event::PackageBytes(bytes) => format!("package {}", bytes.len()),
                    Event::Blocks(blocks) => format!("blocks {}", blocks.len()),
                    Event::Configuration(configuration) => configuration.machine,
                    other => format!("{other:?}"),
                });
            }
            Ok(Step::NeedMore { .. }) => return Ok((told, stream)),
            Err(DecodeError::Corrupt(corrupt)) => return Err(corrupt),
            Err(truncated) => panic!("{truncated}"),
        }
    }
}
