//! `ramwire inspect`: the structure of a captured stream.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use ramwire::stream::qemu::file::encode_header;
use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::mapped::{MappedHeader, bitmap_len, decode_bitmap};
use ramwire::stream::snapshot_note::INCREMENTAL;
use ramwire::stream::{Corrupt, DecodeError};

use super::args::Exit;
use super::common::complain;
use super::output::result_text;
use super::remedies::in_words;

mod input;
mod render;
mod report;

use input::{Input, Noted, open};
use report::{End, Report, Snapshot};

/// Prints sections, blocks, page counts, device state and what is wrong, with offsets.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Look into a stream that a QEMU wrote with migrate exec:cat>vm.stream
    ramwire inspect vm.stream

    # A file with mapped-ram pages, as QEMU or libvirt (format sparse) saves it. Where the stream begins behind a header is
    # found, or given
    ramwire inspect mapped:vm.save
    ramwire inspect mapped:vm.save,offset=4096

    # The same as one JSON object
    zcat vm.stream.gz | ramwire inspect --json -")]
pub(super) struct Args {
    /// Captured stream, or mapped:PATH[,offset=N]; - reads standard input
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Ends with `Done` for a complete stream, `Failed` for a truncated or damaged one or if it can't be read.
pub(super) fn run(args: &Args) -> Exit {
    let mut text = Vec::new();
    let whole = if args.file == Path::new("-") {
        print((Input::Pipe(io::stdin().lock()), None, false), args.json, &mut text)
    } else {
        let mapped = args.file.to_str().is_some_and(|name| name.starts_with("mapped:"));
        open(&args.file).and_then(|(input, noted)| print((input, noted, mapped), args.json, &mut text))
    };
    result_text!("{}", String::from_utf8_lossy(&text));
    match whole {
        Ok(true) => Exit::Done,
        Ok(false) => Exit::Failed,
        Err(error) => {
            let error = format!("{}: {}", args.file.display(), in_words(&error));
            complain("inspect", &*Box::<dyn std::error::Error>::from(error));
            Exit::Failed
        }
    }
}

/// Reads a stream to its end and prints its structure; true if it is complete.
///
/// # Errors
///
/// What reading and writing say. A damaged stream is no error but a report.
fn print<R: Read>(
    (input, noted, mapped): (Input<R>, Noted, bool),
    json: bool,
    out: &mut impl Write,
) -> io::Result<bool> {
    let mut report = inspect(input, noted)?;
    if mapped && report.end == End::Whole {
        report.must_be_mapped();
    }
    if json {
        serde_json::to_writer_pretty(&mut *out, &report)?;
        writeln!(out)?;
    } else {
        out.write_all(render::text(&report).as_bytes())?;
    }
    Ok(report.end == End::Whole
        && report.snapshot.as_ref().is_none_or(|snapshot| snapshot.unusable.is_none()))
}

/// Reads a stream to its end, in memory that does not grow with it.
fn inspect<R: Read>(mut input: Input<R>, noted: Noted) -> io::Result<Report> {
    let (file_len, starts_at) = match &input {
        Input::File(_, len, starts_at) if *len < u64::MAX => (Some(*len), *starts_at),
        _ => (None, 0),
    };
    let config = IncomingConfig {
        adopt_page_size: true,
        accept_fill: true,
        file_len,
        starts_at,
        ..IncomingConfig::default()
    };
    let mut stream = IncomingStream::new(config);
    let mut report = Report::default();
    let mut buffer = vec![0; stream.max_needed().max(256 << 10)];
    let (mut start, mut end) = (0, 0);
    if noted.as_ref().is_some_and(|(note, _)| note.base.is_some()) {
        let mut word = [0; INCREMENTAL.len()];
        input.read_exact(&mut word)?;
        // It stands for the word that the stream of a whole guest begins with.
        let mut first = word.to_vec();
        if word == INCREMENTAL {
            first.clear();
            encode_header(&mut first);
        }
        buffer[..first.len()].copy_from_slice(&first);
        end = first.len();
    }
    report.snapshot = noted.map(Snapshot::new);
    loop {
        let unread = buffer.get(start..end).unwrap_or(&[]);
        let at = stream.position();
        match stream.next(unread) {
            Ok(Step::Event { event: Event::Done, .. }) => {
                let trailing = (end - start) as u64 + io::copy(&mut input, &mut io::sink())?;
                report.finish(&stream, trailing);
                return Ok(report);
            }
            Ok(Step::Event { consumed, event }) => {
                start += consumed;
                report.add(at, consumed as u64, &event);
                if let (Event::MappedBlock { block, header }, Input::File(file, ..), Some(_)) =
                    (&event, &mut input, file_len)
                {
                    let pages = block.used_length / header.page_size.bytes();
                    if !header.is_absent() {
                        report.present(count_present(file, block.name.as_str(), header, pages)?, pages);
                    }
                    let skipped = stream.skip_mapped();
                    report.extend_row(skipped);
                    (start, end) = (0, 0);
                    file.seek(SeekFrom::Start(starts_at + stream.position()))?;
                }
            }
            Ok(Step::NeedMore { consumed, .. }) => {
                report.extend_row(consumed as u64);
                buffer.copy_within(start + consumed..end, 0);
                (start, end) = (0, end - start - consumed);
                let got = read_some(&mut input, buffer.get_mut(end..).unwrap_or(&mut []))?;
                if got == 0 {
                    report.cut(&stream, end as u64);
                    return Ok(report);
                }
                end += got;
            }
            Err(DecodeError::Corrupt(Corrupt { at, fault })) => {
                report.damaged(&stream, at, &fault.to_string());
                return Ok(report);
            }
            // The machine returns NeedMore instead.
            Err(error @ DecodeError::Truncated { .. }) => return Err(io::Error::other(error)),
        }
    }
}

/// The result of a block's bitmap: the number of pages in the file, or an error.
fn count_present(
    file: &File,
    name: &str,
    header: &MappedHeader,
    pages: u64,
) -> io::Result<Result<u64, String>> {
    // Not more than the file has: the parser has compared both.
    let mut bytes = vec![0; usize::try_from(bitmap_len(pages)).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, header.bitmap_offset)?;
    Ok(decode_bitmap(&bytes, name, pages).map(|present| present.count()).map_err(|error| error.to_string()))
}

fn read_some(input: &mut impl Read, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match input.read(into) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use flate2::read::GzDecoder;

    use super::*;

    fn capture(name: &str) -> Vec<u8> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors").join(name);
        let mut bytes = Vec::new();
        GzDecoder::new(File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn text(bytes: &[u8]) -> String {
        let mut out = Vec::new();
        print((Input::Pipe(bytes), None, false), false, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    fn json(bytes: &[u8]) -> serde_json::Value {
        let mut out = Vec::new();
        print((Input::Pipe(bytes), None, false), true, &mut out).unwrap();
        serde_json::from_slice(&out).unwrap()
    }

    #[test]
    fn the_smallest_stream_as_text() {
        insta::assert_snapshot!(text(&capture("q100-none.gz")));
    }

    #[test]
    fn a_stream_with_many_kinds_of_pages_as_text() {
        insta::assert_snapshot!(text(&capture("q100-microvm-xbzrle.gz")));
    }

    #[test]
    fn a_stream_that_is_called_a_mapped_ram_file_is_unusual() {
        let (bytes, mut out) = (capture("q100-none.gz"), Vec::new());
        assert!(!print((Input::Pipe(&bytes[..]), None, true), false, &mut out).unwrap());
        assert!(String::from_utf8(out).unwrap().contains("no mapped-ram file"));
    }

    #[test]
    fn json_counts_pages_by_kind_and_block() {
        let report = json(&capture("q72-microvm-compress.gz"));
        assert_eq!(report["end"], "whole");
        assert_eq!(report["machine"], "microvm");
        assert_eq!(report["pages"]["compressed"], 15);
        assert_eq!(report["pages"]["zero"], 512);
        assert_eq!(report["pages"]["whole"], 4);
        assert_eq!(report["blocks"].as_array().unwrap().len(), 5);
        assert_eq!(report["device_state"]["sections"].as_array().unwrap().len(), 14);
        assert_eq!(report["anomalies"], serde_json::json!([]));
    }

    #[test]
    fn whatever_is_odd_is_told_with_its_offset() {
        let whole = capture("q100-none.gz");
        let mut damaged = whole.clone();
        damaged[100] ^= 0xff;
        let mut fill = whole.clone();
        let zero_record = whole.windows(9).position(|w| w == b"\0\0\0\0\0\0\x10\x22\0").unwrap();
        fill[zero_record + 8] = 7;
        let json_at = whole.iter().position(|byte| *byte == b'{').unwrap();
        #[rustfmt::skip]
        let cases: &[(&str, Vec<u8>, &str, u64, &str)] = &[
            ("cut in RAM",         whole[..1000].to_vec(),              "truncated",      994,    "ends inside"),
            ("cut in the header",  whole[..3].to_vec(),                 "truncated",      0,      "ends inside"),
            ("no description",     whole[..json_at - 5].to_vec(),       "no-description", json_at as u64 - 5, "no VM description"),
            ("bytes behind",       [&whole[..], b"xyz"].concat(),       "whole",          3427,   "3 bytes follow"),
            ("damaged",            damaged,                             "damaged",        94,     ""),
            ("a fill byte",        fill,                                "whole",          zero_record as u64, "fill byte"),
            ("no stream",          b"hello, world".to_vec(),            "damaged",        0,      "magic"),
            ("nothing",            vec![],                              "truncated",      0,      "empty"),
        ];
        for (what, bytes, end, at, said) in cases {
            let report = json(bytes);
            assert_eq!(report["end"], *end, "{what}: {report:#}");
            let anomaly = &report["anomalies"][0];
            assert_eq!(anomaly["at"], *at, "{what}: {report:#}");
            assert!(anomaly["what"].as_str().unwrap().contains(said), "{what}: {anomaly}");
        }
    }

    /// As a QEMU with dirty bitmaps writes it: a section of bitmaps after each section of pages.
    #[test]
    fn sections_of_two_kinds_that_take_turns_are_two_rows() {
        let whole = capture("q72-none.gz");
        let footer = whole.windows(5).position(|bytes| bytes == b"\x7e\0\0\0\x02").unwrap();
        let (before, behind) = whole.split_at(footer + 5);
        let start = b"\x01\0\0\0\x09\x0cdirty-bitmap\0\0\0\0\0\0\0\x01\x1c\x02d0\x02b0\0\x01\0\0\x03\x01\x7e\0\0\0\x09";
        let turn = b"\x02\0\0\0\x02\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x02\0\0\0\x09\x01\x7e\0\0\0\x09";
        let bytes = [before, start, &turn.repeat(20_000), behind].concat();
        let report = json(&bytes);
        assert_eq!(report["end"], "whole", "{report:#}");
        let items = report["items"].as_array().unwrap();
        let bitmaps = items.iter().find(|row| row["what"] == "PART dirty-bitmap (id 9)").unwrap();
        assert_eq!((&bitmaps["count"], &bitmaps["bytes"]), (&20_000.into(), &220_000.into()));
        assert!(items.len() < 12, "{report:#}");
        let total: u64 = items.iter().map(|row| row["bytes"].as_u64().unwrap()).sum();
        assert_eq!(total, bytes.len() as u64);
    }

    #[test]
    fn a_snapshot_without_end_and_a_mapped_file_are_understood() {
        let snapshot = json(&capture("q100-microvm-bgsnapshot.gz"));
        assert_eq!(snapshot["end"], "whole");
        assert!(snapshot["anomalies"][0]["what"].as_str().unwrap().contains("ram END"));
        let mapped = json(&capture("q100-microvm-mappedram.gz"));
        assert_eq!(mapped["end"], "whole");
        assert_eq!(mapped["blocks"][0]["pages_at"], 0x10_0000);
        assert_eq!(mapped["blocks"][0]["pages_present"], serde_json::Value::Null, "a pipe does not go back");
    }

    /// A file is inspected without reading its pages, and its bitmaps are counted; after any prefix.
    #[test]
    fn a_mapped_file_shows_the_pages_that_are_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.save");
        let bytes = capture("q100-microvm-mappedram.gz");
        std::fs::write(&path, &bytes).unwrap();
        let look = |name: &str| {
            let mut out = Vec::new();
            let (input, noted) = open(Path::new(name)).unwrap();
            print((input, noted, true), true, &mut out).unwrap();
            serde_json::from_slice::<serde_json::Value>(&out).unwrap()
        };
        let report = look(&format!("mapped:{}", path.display()));
        assert_eq!((&report["end"], &report["bytes"]), (&"whole".into(), &bytes.len().into()));
        let blocks = report["blocks"].as_array().unwrap();
        let sum = |field: &str| blocks.iter().map(|block| block[field].as_u64().unwrap()).sum::<u64>();
        assert_eq!((sum("pages_present") + sum("holes")) * 4096, sum("length"));
        assert!(sum("pages_present") > 0 && sum("holes") > 0, "{report:#}");
        let (present, holes) = (&blocks[0]["pages_present"], &blocks[0]["holes"]);
        assert_eq!(look(path.to_str().unwrap()), report);
        let mut out = Vec::new();
        let (input, noted) = open(&path).unwrap();
        print((input, noted, true), false, &mut out).unwrap();
        assert!(
            String::from_utf8(out).unwrap().contains(&format!("{present} pages in the file, {holes} holes"))
        );
        assert!(open(Path::new("mapped:x,offset=y")).is_err());
        let far = look(&format!("mapped:{},offset=4", path.display()));
        assert_eq!(far["end"], "damaged");
    }
    /// The captures' own list for each: records by kind, blocks and lengths, devices, and their offsets.
    #[test]
    fn every_captured_stream_is_counted_as_its_list_says() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vectors");
        let list: serde_json::Value =
            serde_json::from_reader(File::open(folder.join("manifest.json")).unwrap()).unwrap();
        let mut seen = 0;
        for (name, told) in list.as_object().unwrap() {
            let Some(file) = told["file"].as_str() else { continue };
            seen += 1;
            let bytes = capture(file.rsplit('/').next().unwrap());
            let report = json(&bytes);
            assert_eq!(report["end"], "whole", "{name}: {report:#}");
            assert_eq!(report["bytes"], told["raw_len"], "{name}");
            for (kind, record) in
                [("whole", "PAGE"), ("zero", "ZERO"), ("compressed", "COMP"), ("xbzrle", "XBZ")]
            {
                let count = told["counts"][record].as_u64().unwrap_or(0);
                assert_eq!(report["pages"][kind], count, "{name}: {kind}");
                let blocks = report["blocks"].as_array().unwrap().iter();
                let sum: u64 = blocks.map(|block| block["pages"][kind].as_u64().unwrap()).sum();
                assert_eq!(sum, count, "{name}: {kind} by block");
            }
            for (block, told) in told["blocks"].as_object().into_iter().flatten() {
                let mut blocks = report["blocks"].as_array().unwrap().iter();
                let found = blocks.find(|found| found["name"] == *block).unwrap();
                assert_eq!(found["length"], told["len"], "{name}: {block}");
            }
            let state = &report["device_state"];
            assert_eq!(state["at"], told["first_device_offset"], "{name}");
            let (devices, told) =
                (state["sections"].as_array().unwrap(), told["devices"].as_array().unwrap());
            assert_eq!((devices.len(), &state["exact"]), (told.len(), &true.into()), "{name}");
            for (device, told) in devices.iter().zip(told) {
                for (ours, theirs) in [
                    ("name", "name"),
                    ("bytes", "payload_len"),
                    ("instance", "instance"),
                    ("version", "version"),
                ] {
                    assert_eq!(device[ours], told[theirs], "{name}: {device}");
                }
            }
            // The items cover the stream: each begins at the end of the one before it.
            let mut at = 0;
            for item in report["items"].as_array().unwrap() {
                assert!(item["at"].as_u64().unwrap() >= at, "{name}: {item}");
                at = item["at"].as_u64().unwrap() + item["bytes"].as_u64().unwrap();
            }
            let shown = text(&bytes);
            for device in devices {
                assert!(shown.contains(device["name"].as_str().unwrap()), "{name}: {shown}");
            }
        }
        assert!(seen >= 10, "{seen} captures");
    }

    /// Broken in the middle: the items before it are still shown, as text and as JSON, with the offset of the break.
    #[test]
    fn a_damaged_stream_is_shown_up_to_the_damage_with_its_offset() {
        let whole = capture("q100-microvm-xbzrle.gz");
        let before = json(&whole);
        let end = before["items"][4]["at"].as_u64().unwrap() as usize;
        let mut damaged = whole;
        damaged[end + 17] ^= 1;
        let report = json(&damaged);
        assert_eq!((&report["end"], &report["pages"]), (&"damaged".into(), &before["pages"]));
        let at = report["anomalies"][0]["at"].as_u64().unwrap() as usize;
        assert!((end..end + 18).contains(&at), "{report:#}");
        let shown = text(&damaged);
        assert!(
            shown.contains("damaged") && shown.contains("unusual") && shown.contains(&format!("{at:#x}"))
        );
        assert!(shown.contains("END ram") && shown.contains("239"), "{shown}");
    }
}
