//! The captures of postcopy with preempt channel, pause and recovery: commands, package, requests, bitmaps.

use ramwire::stream::DecodeError;
use ramwire::stream::qemu::command::{Command, decode_command};
use ramwire::stream::qemu::incoming::{Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::return_path::{Message, decode_bitmap, decode_message};
use ramwire::stream::qemu::{ram, return_path};
use ramwire::units::PageSize;

use super::captures;

const QEMUS: [&str; 2] = ["q72", "q100"];

fn part(qemu: &str, part: &str) -> Vec<u8> {
    captures::read(&format!("{qemu}-microvm-postcopy-preempt-recover-{part}.gz"))
}

/// Drains `bytes` and passes each event to `tell`; returns the rest after the last complete one.
fn drain<'a>(stream: &mut IncomingStream, bytes: &'a [u8], mut tell: impl FnMut(Event<'a>)) -> &'a [u8] {
    let mut at = 0;
    loop {
        match stream.next(&bytes[at..]).unwrap() {
            Step::Event { consumed, event } => {
                at += consumed;
                let done = event == Event::Done;
                tell(event);
                if done {
                    return &bytes[at..];
                }
            }
            Step::NeedMore { consumed, .. } => return &bytes[at + consumed..],
        }
    }
}

#[test]
fn s13_s56_s57_s58_main_goes_from_precopy_to_postcopy_and_is_cut() {
    for qemu in QEMUS {
        let bytes = part(qemu, "set0-conn0-fwd");
        let mut stream = IncomingStream::new(IncomingConfig::default());
        let (mut commands, mut package, mut pages_after) = (Vec::new(), Vec::new(), 0);
        let mut whole = false;
        drain(&mut stream, &bytes, |event| match event {
            Event::Command(Command::PostcopyRamDiscard(discard)) => {
                assert!((1..=12).contains(&discard.ranges().len()), "{qemu}");
                assert!(discard.ranges().all(|(start, length)| (start | length) % 4096 == 0 && length > 0));
                commands.push(6);
            }
            Event::Command(command) => commands.push(command.number()),
            Event::PackageBytes(bytes) => package.extend_from_slice(bytes),
            Event::PackageEnd => whole = true,
            Event::Page { .. } | Event::Zero { .. } if whole => pages_after += 1,
            _ => {}
        });
        assert!(stream.seen().postcopy_advised && stream.seen().return_path && whole, "{qemu}");
        assert_eq!(stream.seen().switchover_start, qemu == "q100");
        commands.dedup();
        let switchover: &[u16] = if qemu == "q100" { &[11] } else { &[] };
        assert_eq!(commands, [&[1, 2, 3], switchover, &[6, 2, 7, 2]].concat(), "{qemu}");
        assert!(pages_after > 5, "{qemu}");
        assert!(stream.finish().unwrap_err().is_truncated(), "{qemu}: it was cut");

        assert_eq!(decode_command(&package).unwrap().0, Command::PostcopyListen, "{qemu}");
        let (ping, run) = package[package.len() - 14..].split_at(9);
        assert_eq!(decode_command(ping).unwrap().0, Command::Ping(3), "{qemu}");
        assert_eq!(decode_command(run).unwrap().0, Command::PostcopyRun, "{qemu}");
    }
}

#[test]
fn s66_s68_recovery_goes_on_without_header() {
    for qemu in QEMUS {
        let mut stream = IncomingStream::new(IncomingConfig::default());
        drain(&mut stream, &part(qemu, "set0-conn0-fwd"), |_| {});
        stream.restart();
        let bytes = part(qemu, "set1-conn0-fwd");
        let (mut commands, mut pages, mut done) = (Vec::new(), 0, false);
        let rest = drain(&mut stream, &bytes, |event| match event {
            Event::Command(command) => commands.push(command.number()),
            Event::Page { .. } | Event::Zero { .. } => pages += 1,
            Event::Done => done = true,
            _ => {}
        });
        assert_eq!(commands, [10, 10, 10, 10, 10, 9], "{qemu}: a bitmap for each block, then RESUME");
        assert!(done && rest.is_empty() && pages > 100, "{qemu}");
    }
}

#[test]
fn s52_s62_s67_the_return_path_decodes_and_encodes_to_itself() {
    for qemu in QEMUS {
        let mut stream = IncomingStream::new(IncomingConfig::default());
        drain(&mut stream, &part(qemu, "set0-conn0-fwd"), |_| {});
        for set in ["set0-conn0-rp", "set1-conn0-rp"] {
            let bytes = part(qemu, set);
            let (mut at, mut again, mut numbers) = (0, Vec::new(), Vec::new());
            while at < bytes.len() {
                let (message, used) = match decode_message(&bytes[at..]) {
                    Ok(decoded) => decoded,
                    // The proxy cut the first set.
                    Err(DecodeError::Truncated { .. }) if set.starts_with("set0") => break,
                    Err(error) => panic!("{qemu} {set} at {at}: {error}"),
                };
                message.encode(&mut again);
                numbers.push(message.number());
                at += used;
                if let Message::ReceivedBitmap { block } = message {
                    let index = stream.blocks().find(block).unwrap();
                    let pages = stream.blocks().as_slice()[index.as_usize()].used_length / 4096;
                    let (bits, used) = decode_bitmap(&bytes[at..], pages).unwrap();
                    return_path::encode_bitmap(bits, &mut again);
                    at += used;
                }
                assert_eq!(again, &bytes[..at], "{qemu} {set}");
            }
            if set == "set0-conn0-rp" {
                assert_eq!(numbers[0], 2, "{qemu}: PONG comes first");
                assert!(numbers.contains(&3), "{qemu}: {numbers:?}");
            } else {
                assert_eq!(numbers[..6], [5, 5, 5, 5, 5, 6], "{qemu}: bitmaps, then RESUME_ACK");
                assert_eq!(numbers.last(), Some(&1), "{qemu}: SHUT is the last");
            }
        }
    }
}

#[test]
fn s63_s64_the_preempt_channel_is_bare_records() {
    for (qemu, set, eos) in [("q72", "set0", false), ("q72", "set1", true), ("q100", "set0", false)] {
        let bytes = part(qemu, &format!("{set}-conn1-fwd"));
        let (mut at, mut named, mut pages, mut ended) = (0, 0, 0, false);
        while let Ok((record, used)) = ram::decode_record(&bytes[at..], PageSize::SIZE_4K) {
            at += used;
            match record {
                ram::Record::Page(page) => {
                    named += u32::from(page.block.is_some());
                    assert!(named > 0, "{qemu} {set}: the first record names its block");
                    pages += 1;
                    at += 4096;
                }
                ram::Record::Eos => ended = true,
                other => panic!("{qemu} {set}: {other:?}"),
            }
            if at >= bytes.len() {
                break;
            }
        }
        assert_eq!((ended, pages > 0), (eos, !eos), "{qemu} {set}");
    }
}
