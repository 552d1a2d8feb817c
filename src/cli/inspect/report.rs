//! The findings of `inspect`, ready to be printed.

use ramwire::stream::qemu::blocks::BlockAnnouncement;
use ramwire::stream::qemu::file::MAPPED_RAM;
use ramwire::stream::qemu::incoming::{Ending, Event, IncomingStream, SectionKind};
use ramwire::stream::qemu::section::Phase;
use ramwire::stream::qemu::style::PeerStyle;
use ramwire::stream::snapshot_note::SnapshotNote;
use ramwire::units::BlockIndex;
use serde::Serialize;

/// Maximum number of rows and anomalies that are kept: a stream may have millions of sections.
const MAX_ROWS: usize = 10_000;

/// The structure of a stream.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// How far it could be parsed.
    pub(super) end: End,
    /// Bytes that were parsed or copied.
    pub(super) bytes: u64,
    pub(super) machine: Option<String>,
    /// It has a configuration section.
    pub(super) configuration: bool,
    /// Its sections have footers.
    pub(super) footers: bool,
    pub(super) page_size: u64,
    pub(super) capabilities: Vec<String>,
    pub(super) uuid: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) snapshot: Option<Snapshot>,
    /// Dialect of the sender, where machine name or stream tell it.
    pub(super) style: Option<String>,
    /// Pages by kind.
    pub(super) pages: Pages,
    pub(super) blocks: Vec<Block>,
    /// Items in stream order; equal neighbours share one row, also if two kinds alternate.
    pub(super) items: Vec<Row>,
    /// A block's bitmap is invalid.
    #[serde(skip)]
    has_bad_bitmap: bool,
    /// The row of the open item.
    #[serde(skip)]
    open: usize,
    pub(super) device_state: Option<DeviceState>,
    pub(super) anomalies: Vec<Anomaly>,
}

/// What a file says of the snapshot in it.
#[derive(Debug, Serialize)]
pub(super) struct Snapshot {
    pub(super) id: String,
    /// The one that it holds only the changes since: its id, and its file, seen from the folder of this one.
    pub(super) base: Option<(String, String)>,
    /// Why it can't be read with its bases.
    pub(super) unusable: Option<String>,
}

impl Snapshot {
    pub(super) fn new((note, unusable): (SnapshotNote, Option<String>)) -> Self {
        let base = note.base.map(|base| (base.id.to_string(), base.path));
        Self { id: note.id.to_string(), base, unusable }
    }
}

/// How far a stream could be followed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum End {
    /// To its end.
    Whole,
    /// To an end of file that no VM description confirms.
    NoDescription,
    /// It stops inside a value.
    #[default]
    Truncated,
    /// Something in it is wrong.
    Damaged,
}

/// Records by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Pages {
    pub(super) whole: u64,
    pub(super) zero: u64,
    pub(super) filled: u64,
    pub(super) compressed: u64,
    pub(super) xbzrle: u64,
}

/// A RAM block.
#[derive(Debug, Serialize)]
pub(super) struct Block {
    pub(super) name: String,
    pub(super) length: u64,
    pub(super) host_page: Option<u64>,
    pub(super) guest_addr: Option<u64>,
    /// Offset of its pages in a mapped-ram file.
    pub(super) pages_at: Option<u64>,
    /// Pages that are in such a file.
    pub(super) pages_present: Option<u64>,
    /// Pages that are not in it, and read as zero.
    pub(super) holes: Option<u64>,
    pub(super) pages: Pages,
}

/// An item of the stream, or several equal ones in a row.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Row {
    pub(super) at: u64,
    pub(super) bytes: u64,
    pub(super) what: String,
    pub(super) count: u64,
}

/// Device sections as the VM description divides them.
#[derive(Debug, Serialize)]
pub(super) struct DeviceState {
    pub(super) at: u64,
    pub(super) bytes: u64,
    /// Every footer is at its described offset.
    pub(super) exact: bool,
    pub(super) sections: Vec<Device>,
}

/// A device section.
#[derive(Debug, Serialize)]
pub(super) struct Device {
    pub(super) name: String,
    pub(super) instance: u32,
    pub(super) version: u32,
    pub(super) section_id: u32,
    pub(super) bytes: u64,
}

/// Something that a plain stream does not have.
#[derive(Debug, Serialize)]
pub(super) struct Anomaly {
    pub(super) at: u64,
    pub(super) what: String,
}

impl Report {
    /// Adds one event, which is at `at` and has `len` bytes.
    pub(super) fn add(&mut self, at: u64, len: u64, event: &Event<'_>) {
        match event {
            Event::Configuration(_) => self.row(at, len, "configuration".into()),
            Event::Command(command) => self.row(at, len, format!("command {}", command.name())),
            Event::SectionStart { phase, id, kind } => {
                self.row(at, len, format!("{} {} (id {id})", phase_name(*phase), kind_name(*kind)));
            }
            Event::PackageBytes(_) => self.piece(at, len, "package"),
            Event::Eof => self.row(at, len, "end of file".into()),
            Event::TailBytes(_) => {
                self.piece(at, len, "device state");
                let state = self.device_state.get_or_insert(DeviceState {
                    at,
                    bytes: 0,
                    exact: false,
                    sections: Vec::new(),
                });
                state.bytes += len;
            }
            _ => {
                self.extend_row(len);
                self.add_to_section(at, event);
            }
        }
    }

    fn add_to_section(&mut self, at: u64, event: &Event<'_>) {
        match event {
            Event::Blocks(blocks) if self.blocks.len() < blocks.len() => {
                self.blocks = blocks.iter().map(|block| Block::new(block, None)).collect();
            }
            Event::MappedBlock { block, header } => {
                self.blocks.push(Block::new(block, Some(header.pages_offset)));
            }
            Event::Page { block, .. } => self.count(*block, |pages| pages.whole += 1),
            Event::Zero { block, .. } => self.count(*block, |pages| pages.zero += 1),
            Event::Compressed { block, .. } => self.count(*block, |pages| pages.compressed += 1),
            Event::Xbzrle { block, .. } => self.count(*block, |pages| pages.xbzrle += 1),
            Event::Filled { block, byte, .. } => {
                self.count(*block, |pages| pages.filled += 1);
                self.anomaly(
                    at,
                    format!("a zero-page record has the fill byte {byte:#04x}; newer receivers refuse it"),
                );
            }
            _ => {}
        }
    }

    /// The result of the bitmap of the block listed last.
    pub(super) fn present(&mut self, present: Result<u64, String>, pages: u64) {
        let Some(block) = self.blocks.last_mut() else { return };
        let pages_at = block.pages_at.unwrap_or(0);
        match present {
            Ok(present) => {
                block.pages_present = Some(present);
                block.holes = Some(pages.saturating_sub(present));
            }
            Err(why) => {
                self.anomaly(pages_at, why);
                self.has_bad_bitmap = true;
            }
        }
    }

    fn count(&mut self, block: BlockIndex, add: impl Fn(&mut Pages)) {
        add(&mut self.pages);
        if let Some(block) = self.blocks.get_mut(block.as_usize()) {
            add(&mut block.pages);
        }
    }

    /// The stream has ended; `trailing` bytes follow.
    pub(super) fn finish(&mut self, stream: &IncomingStream, trailing: u64) {
        self.end = if self.has_bad_bitmap { End::Damaged } else { End::Whole };
        if trailing > 0 {
            self.anomaly(stream.position(), format!("{trailing} bytes follow the end of the stream"));
        }
        self.sum_up(stream);
    }

    /// It was called a mapped-ram file.
    pub(super) fn must_be_mapped(&mut self) {
        if !self.capabilities.iter().any(|capability| capability == MAPPED_RAM) {
            self.end = End::Damaged;
            let what =
                "this is no mapped-ram file but a stream: leave `mapped:` out, and receive it with `file:`";
            self.anomaly(0, what.into());
        }
    }

    /// The input has ended with `unread` bytes of an incomplete value.
    pub(super) fn cut(&mut self, stream: &IncomingStream, unread: u64) {
        let at = stream.position();
        match stream.finish() {
            Ok(Ending::Whole) => self.end = End::Whole,
            Ok(Ending::NoDescription) => {
                self.end = End::NoDescription;
                self.anomaly(
                    at,
                    "no VM description follows the device state, so nothing proves that it is whole".into(),
                );
            }
            Err(_) if at == 0 && unread == 0 => self.anomaly(0, "the input is empty".into()),
            Err(_) => self
                .anomaly(at, format!("the stream ends inside what begins here, after {unread} bytes of it")),
        }
        self.sum_up(stream);
    }

    /// The byte at `at` is invalid.
    pub(super) fn damaged(&mut self, stream: &IncomingStream, at: u64, what: &str) {
        self.end = End::Damaged;
        self.anomaly(at, what.to_owned());
        self.sum_up(stream);
    }

    fn sum_up(&mut self, stream: &IncomingStream) {
        self.bytes = stream.position();
        self.page_size = stream.page_size().bytes();
        let framing = stream.seen().framing;
        (self.configuration, self.footers) = (framing.configuration, framing.footers);
        if let Some(configuration) = stream.configuration() {
            self.machine = framing.configuration.then(|| configuration.machine.clone());
            self.capabilities.clone_from(&configuration.capabilities);
            self.uuid = configuration.uuid.map(hex_uuid);
            self.style =
                PeerStyle::of_source(&configuration.machine, stream.seen()).map(|style| style.to_string());
        }
        if self.end == End::Whole && self.device_state.is_some() && !stream.seen().ram_end {
            let at = self.device_state.as_ref().map_or(0, |state| state.at);
            self.anomaly(
                at,
                "no ram END stands in front of the device state, as in a background snapshot".into(),
            );
        }
        self.describe_devices(stream);
    }

    fn describe_devices(&mut self, stream: &IncomingStream) {
        let (Some(state), Some(description)) = (&mut self.device_state, stream.tail().description()) else {
            return;
        };
        let split = &description.split;
        state.exact = split.is_exact();
        let device = |section: &ramwire::stream::qemu::vmdesc::DeviceSection| Device {
            name: section.name.clone(),
            instance: section.instance,
            version: section.version,
            section_id: section.id,
            bytes: section.payload.len() as u64,
        };
        state.sections = split.sections.iter().map(device).collect();
        if let Some((offset, why)) = split.unreliable {
            let at = state.at + offset as u64;
            self.anomaly(at, format!("the device state could not be cut into sections: {why}"));
        }
    }

    /// Begins an item, or adds to a row of its kind: the last one, or the one before. A guest with dirty bitmaps sends
    /// a section of them after every section of pages.
    fn row(&mut self, at: u64, bytes: u64, what: String) {
        let near = self.items.len().saturating_sub(2);
        let same = self.items.get(near..).and_then(|rows| rows.iter().rposition(|row| row.what == what));
        match same {
            Some(index) => self.open = near + index,
            None if self.items.len() < MAX_ROWS => {
                self.open = self.items.len();
                self.items.push(Row { at, bytes: 0, what, count: 0 });
            }
            None => {
                self.open = MAX_ROWS - 1;
                if let Some(last) = self.items.last_mut() {
                    "further items".clone_into(&mut last.what);
                }
            }
        }
        self.extend_row(bytes);
        if let Some(row) = self.items.get_mut(self.open) {
            row.count += 1;
        }
    }

    /// A piece of an item; the number of pieces depends on the input.
    fn piece(&mut self, at: u64, bytes: u64, what: &str) {
        if self.items.get(self.open).is_some_and(|row| row.what == what) {
            self.extend_row(bytes);
        } else {
            self.row(at, bytes, what.to_owned());
        }
    }

    /// Adds bytes to the open item.
    pub(super) fn extend_row(&mut self, bytes: u64) {
        if let Some(row) = self.items.get_mut(self.open) {
            row.bytes += bytes;
        }
    }

    fn anomaly(&mut self, at: u64, what: String) {
        if self.anomalies.len() < MAX_ROWS {
            self.anomalies.push(Anomaly { at, what });
        }
    }
}

impl Block {
    fn new(block: &BlockAnnouncement, pages_at: Option<u64>) -> Self {
        Self {
            name: block.name.to_string(),
            length: block.used_length,
            host_page: block.host_page.map(|page| page.bytes()),
            guest_addr: block.guest_addr.map(|addr| addr.0),
            pages_at,
            pages_present: None,
            holes: None,
            pages: Pages::default(),
        }
    }
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Start => "START",
        Phase::Part => "PART",
        Phase::End => "END",
        Phase::Full => "FULL",
    }
}

fn kind_name(kind: SectionKind) -> &'static str {
    match kind {
        SectionKind::Ram => "ram",
        SectionKind::DirtyBitmap => "dirty-bitmap",
        SectionKind::EarlyVirtioMem => "virtio-mem-device-early",
        SectionKind::NativeState => "ramwire/state",
    }
}

fn hex_uuid(uuid: [u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}
