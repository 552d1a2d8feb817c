//! A QEMU's reaction to a flipped byte: a map of the whole stream, which shows where a flip is detected and where it is
//! data.
//!
//! QEMU's stream has no checksum. For every position of the stream that `send` sends, the map predicts the effect of
//! flipping the lowest bit there; a sample of positions is tested against a QEMU.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};

use crate::common::{
    Deadline,
    memory::{Random, compare},
    qemu::{Version, peers_present},
    ramwire::Ramwire,
    scratch,
};
use crate::qemu::{COMMANDS, Proxy, When, folder, kept, recorded, state_of, waiting};

const PAGE: u64 = 4096;

/// The kind of a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// Compared with the expected value: refused.
    Frame,
    /// Bytes of a page.
    Page,
    /// Bits of a page's offset with which it is placed at another offset of its block.
    PageOffset,
    /// The same for a zero page.
    ZeroOffset,
    /// The fill byte of zero pages; QEMU 10.0 refuses any other than zero.
    Fill,
    /// Address bits of an end mark, which are ignored.
    EndMark,
    /// Payload and version of a device: the device may notice the flip, or not.
    Device,
    /// The VM description, which a destination skips.
    Description,
    /// Values of commands that are only echoed, and lengths that are only used to skip.
    Answered,
}

/// The parts of a stream that are not frame, in order. Everything between them is frame.
#[derive(Debug)]
struct Map {
    data: Vec<(Range<u64>, Kind)>,
    /// Offsets of pages whose bytes are in the block that is compared.
    compared: Vec<u64>,
    len: u64,
}

impl Map {
    /// The map of the stream that `send` sends to a QEMU: the same as to a file, with the return path's commands before
    /// RAM.
    fn of(stream: &[u8], version: Version) -> Self {
        let mut map = Self { data: Vec::new(), compared: Vec::new(), len: stream.len() as u64 + COMMANDS };
        let mut parser = IncomingStream::new(IncomingConfig::default());
        let (mut at, mut tail) = (0, None);
        let mut blocks = Vec::new();
        while let Step::Event { consumed, event } = parser.next(&stream[at..]).unwrap() {
            let bytes = &stream[at..at + consumed];
            let place = at as u64 + COMMANDS;
            match event {
                // OPEN_RETURN_PATH and four PINGs follow it; a PING is head (5 bytes) and value.
                Event::Configuration(_) => {
                    let pings = at as u64 + consumed as u64 + 5;
                    for value in (0..4).map(|ping| pings + 9 * ping + 5) {
                        map.add(value..value + 4, Kind::Answered);
                    }
                }
                Event::Blocks(ref list) => blocks = list.iter().map(|block| block.used_length).collect(),
                Event::Page { block, .. } => {
                    map.add_offset(bytes, place, blocks[block.as_usize()], Kind::PageOffset);
                    let begin = place + consumed as u64 - PAGE;
                    map.add(begin..begin + PAGE, Kind::Page);
                    map.compared.extend((block.0 == 0).then_some(begin));
                }
                Event::Zero { block, .. } => {
                    map.add_offset(bytes, place, blocks[block.as_usize()], Kind::ZeroOffset);
                    let fill = place + consumed as u64 - 1;
                    map.add(
                        fill..fill + 1,
                        if version == Version::Qemu72 { Kind::Fill } else { Kind::Frame },
                    );
                }
                Event::RecordsEnd => map.add(place..place + 6, Kind::EndMark),
                Event::TailBytes(_) => drop(tail.get_or_insert(place)),
                _ => {}
            }
            at += consumed;
            if matches!(event, Event::Done) {
                break;
            }
        }
        let (description, tail) = (parser.tail().description().unwrap(), tail.unwrap());
        assert!(description.split.is_exact(), "the device state could not be cut");
        for device in &description.split.sections {
            let payload = device.payload.start as u64 - 4..device.payload.end as u64;
            map.add(tail + payload.start..tail + payload.end, Kind::Device);
        }
        // After the byte that ends the sections: type, length, text.
        let text = tail + description.eof_at as u64 + 6;
        map.add(text - 5..text, Kind::Answered);
        map.add(text..map.len, Kind::Description);
        map
    }

    fn add(&mut self, range: Range<u64>, kind: Kind) {
        if kind != Kind::Frame && !range.is_empty() {
            self.data.push((range, kind));
        }
    }

    /// Bytes of a record's word whose lowest bit can be flipped without moving the offset out of the block or changing
    /// the kind.
    fn add_offset(&mut self, record: &[u8], place: u64, length: u64, kind: Kind) {
        let word = u64::from_be_bytes(record[..8].try_into().unwrap());
        for byte in 0..8 {
            let flipped = word ^ 1 << (56 - 8 * byte);
            if flipped % PAGE == word % PAGE && flipped & !(PAGE - 1) < length {
                self.add(place + byte..place + byte + 1, kind);
            }
        }
    }

    /// Ranges and bytes of each kind, including frame. The parts are in order, do not overlap, and are inside the
    /// stream.
    fn counts(&self) -> BTreeMap<Kind, (u64, u64)> {
        let mut counts = BTreeMap::new();
        let mut at = 0;
        for (range, kind) in &self.data {
            assert!(at <= range.start && range.start < range.end, "{kind:?} at {range:?} begins before {at}");
            for (kind, bytes) in [(Kind::Frame, range.start - at), (*kind, range.end - range.start)] {
                let count: &mut (u64, u64) = counts.entry(kind).or_default();
                *count = (count.0 + u64::from(bytes > 0), count.1 + bytes);
            }
            at = range.end;
        }
        assert_eq!(at, self.len, "the stream ends with its description");
        counts
    }

    fn kind_at(&self, at: u64) -> Kind {
        let part = self.data.iter().find(|(range, _)| range.contains(&at));
        part.map_or(Kind::Frame, |(_, kind)| *kind)
    }

    /// `count` positions of `kind`, spread over the stream; for pages only those of the compared memory.
    fn sample(&self, kind: Kind, count: usize, random: &mut Random) -> Vec<u64> {
        let pages = || self.compared.iter().map(|begin| *begin..begin + PAGE).collect();
        let parts =
            || self.data.iter().filter(|(_, own)| *own == kind).map(|(range, _)| range.clone()).collect();
        let ranges: Vec<Range<u64>> = if kind == Kind::Page { pages() } else { parts() };
        let pick = |at: usize| {
            let range = &ranges[at * ranges.len() / count
                + random.draw() as usize
                    % ranges.len().div_ceil(count).min(ranges.len() - at * ranges.len() / count)];
            range.start + random.draw() % (range.end - range.start)
        };
        if ranges.is_empty() { Vec::new() } else { (0..count).map(pick).collect() }
    }

    /// Frame positions that a selection by size would miss: there is one byte of it for each page.
    fn frames(&self, stream: &[u8]) -> Vec<u64> {
        let find = |needle: &[u8]| stream.windows(needle.len()).position(|w| w == needle).unwrap() as u64;
        let middle = self.compared[self.compared.len() / 2];
        let last_device = self.data.iter().rfind(|(_, kind)| *kind == Kind::Device).unwrap().0.clone();
        vec![
            3,                                       // the magic
            14,                                      // the machine's name
            find(b"\x03ram\0\0\0\0") + 2 + COMMANDS, // the name of the section
            find(b"\x02m0") + 1 + COMMANDS,          // the name of a block
            middle - 2,                              // the flags in front of a page
            middle - 8,                              // the highest bits of its offset
            last_device.end,                         // a footer
            last_device.end + 4,                     // the id in it
        ]
    }
}

/// A QEMU's reaction to a stream that is flipped at `at`, and whether it is as predicted.
fn flip(dir: &Path, folder: &Path, version: Version, at: u64, kind: Kind) {
    let (mut destination, uri) = waiting(dir, version, "flip");
    let proxy = Proxy::start(&uri, When::Flip(at), || ());
    let arguments = [
        "send",
        &proxy.uri,
        "--again",
        "--destination-is-dead",
        "--finish-timeout",
        "20",
        "--stall-timeout",
        "20",
        "--dir",
    ];
    let stays = kept(folder);
    let mut sender = Ramwire::start(dir, &arguments, folder);
    let (status, text) = sender.ended(Deadline::seconds(60));
    let arrived = destination.ram.clone();
    let pages = || compare(&dir.join("ram"), &arrived).err().map_or(0, |found| found.pages);
    let what = format!("{version}: byte {at}, {kind:?}: status {status}");
    match (kind, status) {
        (Kind::Frame, 3) => {
            println!("{what}: refused: {}", text.trim());
            assert_eq!(state_of(folder), stays, "{what}");
        }
        // It closes without a message (7.2), and by then the source may have sent everything.
        (Kind::Frame, 5) => {
            assert!(!destination.wait_exit(Deadline::seconds(20)).success(), "{what}");
            assert!(destination.stderr().contains("load of migration failed"), "{}", destination.stderr());
            println!("{what}: refused without a word: {}", destination.stderr().trim());
            assert_eq!(state_of(folder), "in-doubt", "{what}");
        }
        // A device that notices it refuses its state before COMMIT, or QEMU dies of it.
        (Kind::Device, 3 | 5) => {
            println!("{what}: seen by the device: {}", text.trim());
            assert_eq!(state_of(folder), if status == 3 { stays.as_str() } else { "in-doubt" }, "{what}");
        }
        (Kind::Answered, 3) => {
            println!("{what}: seen: {}", text.trim());
            assert_eq!(state_of(folder), stays, "{what}");
        }
        (kind, 0) if kind != Kind::Frame => {
            let (pages, most) = (pages(), if kind == Kind::PageOffset { 2 } else { 1 });
            println!("{what}: data, can't be seen; {pages} pages differ");
            assert_eq!(state_of(folder), "sent", "{what}");
            assert!(kind != Kind::Page || pages == 1, "{what}: {pages} pages differ");
            assert!(pages <= most, "{what}: {pages} pages differ");
        }
        _ => panic!("{what}: {text}\n{}", destination.stderr()),
    }
    drop(sender);
    destination.kill();
    proxy.end();
}

/// Prints each kind with its ranges and bytes, then tests at least 24 positions against a QEMU.
fn every_kind_of_byte(version: Version) {
    if !peers_present() {
        return;
    }
    let dir = scratch();
    let folder = folder(dir.path(), version);
    let stream = recorded(&folder);
    let map = Map::of(&stream, version);
    let counts = map.counts();
    println!("{version}: {} bytes, of which a flip of the lowest bit can't be seen in:", map.len);
    for (kind, (ranges, bytes)) in &counts {
        println!("{version}: {kind:?}: {ranges} ranges, {bytes} bytes");
    }
    assert_eq!(counts.values().map(|(_, bytes)| bytes).sum::<u64>(), map.len);
    assert_eq!(counts[&Kind::Page].1 % PAGE, 0);
    let mut random = Random(version as u64);
    let mut places: Vec<u64> = map.frames(&stream);
    for (kind, count) in [
        (Kind::Page, 5),
        (Kind::PageOffset, 2),
        (Kind::ZeroOffset, 2),
        (Kind::Fill, 1),
        (Kind::EndMark, 1),
        (Kind::Device, 4),
        (Kind::Answered, 2),
        (Kind::Description, 2),
    ] {
        places.extend(map.sample(kind, count, &mut random));
    }
    assert!(places.len() >= 24, "{places:?}");
    for at in places {
        flip(dir.path(), &folder, version, at, map.kind_at(at));
    }
}

#[test]
fn a_qemu_72_sees_a_flip_in_the_frame_and_none_in_data() {
    every_kind_of_byte(Version::Qemu72);
}

#[test]
fn a_qemu_100_sees_a_flip_in_the_frame_and_none_in_data() {
    every_kind_of_byte(Version::Qemu100);
}

#[test]
fn the_newest_qemu_sees_a_flip_in_the_frame_and_none_in_data() {
    every_kind_of_byte(Version::Newest);
}
