//! Truncated and damaged captures: refused or incomplete, never a panic.

use proptest::prelude::*;
use proptest::test_runner::{Config, RngSeed, TestRunner};

use ramwire::stream::DecodeError;
use ramwire::stream::qemu::colo::{ColoMessage, encode_size};
use ramwire::stream::qemu::incoming::{Ending, Event, IncomingConfig, IncomingStream, Step};
use ramwire::stream::qemu::multifd::Method;
use ramwire::stream::qemu::ram::EOS_RECORD;
use ramwire::stream::qemu::section;

use super::replay::Replay;
use super::{captures, fuzz_bodies};

/// A prefix of a valid stream always needs more bytes; only one with the whole device state may be accepted as an end.
#[test]
fn a_capture_cut_anywhere_is_truncated_never_corrupt() {
    for (name, promise, bytes) in
        captures::whole_streams().into_iter().filter(|(_, _, bytes)| bytes.len() < 400_000)
    {
        let mut stream = IncomingStream::new(IncomingConfig::default());
        let (mut at, mut done) = (0, false);
        for cut in 0..=bytes.len() {
            match stream.finish() {
                Ok(Ending::NoDescription) => {
                    assert!(cut as u64 > promise.first_device_offset.unwrap(), "{name} cut at {cut}")
                }
                Err(DecodeError::Truncated { .. }) => {}
                other => panic!("{name} cut at {cut}: {other:?}"),
            }
            loop {
                match stream
                    .next(&bytes[at..cut])
                    .unwrap_or_else(|error| panic!("{name} cut at {cut}: {error}"))
                {
                    Step::Event { event: Event::Done, .. } => {
                        done = true;
                        break;
                    }
                    Step::Event { consumed, .. } => at += consumed,
                    Step::NeedMore { consumed, needed } => {
                        at += consumed;
                        assert!(needed > cut - at, "{name} cut at {cut}: asks for bytes it has");
                        assert!(
                            at + needed <= bytes.len(),
                            "{name} cut at {cut}: asks for more than there is"
                        );
                        break;
                    }
                }
            }
            assert_eq!(done, cut == bytes.len(), "{name} cut at {cut}");
        }
    }
}

/// Streams with a few changed bytes run through the fuzz bodies.
#[test]
fn s79_flipped_bytes_are_refused_or_pass_within_bounds() {
    let captures: Vec<Vec<u8>> = captures::manifest()
        .into_values()
        .flat_map(|promise| promise.file.into_iter().chain(promise.parts.into_iter().map(|part| part.file)))
        .map(|file| captures::read(&file))
        .filter(|bytes| bytes.len() < 400_000)
        .collect();
    assert!(captures.len() > 20);
    let config =
        Config { cases: 3000, rng_seed: RngSeed::Fixed(7), failure_persistence: None, ..Config::default() };
    let flips = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
    let cases = (any::<prop::sample::Index>(), flips, any::<bool>());
    TestRunner::new(config)
        .run(&cases, |(which, flips, in_front)| {
            let mut bytes = which.get(&captures).clone();
            // Half the cases aim at the front, where headers and the block list are.
            let reach = if in_front { bytes.len().min(300) } else { bytes.len() };
            for (at, byte) in flips {
                bytes[at.index(reach)] ^= byte;
            }
            fuzz_bodies::stream(&bytes);
            for start in [0, 4, 12, 30] {
                let rest = bytes.get(start..).unwrap_or(&[]);
                fuzz_bodies::record(rest);
                fuzz_bodies::command(rest);
                fuzz_bodies::message(rest);
                fuzz_bodies::xbzrle_page(rest.get(..4096).unwrap_or(rest));
            }
            Ok(())
        })
        .unwrap();
}

/// Every single byte of the smallest stream, changed: the machine stays within its limits.
#[test]
fn s79_every_byte_of_a_small_stream_may_be_wrong() {
    let bytes = captures::read("q100-none.gz");
    let mut refused = 0;
    for at in 0..bytes.len() {
        for flip in [0x01, 0x80, 0xff] {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            let mut replay = Replay::new();
            refused += u32::from(replay.feed(&bad, bad.len()).is_err());
            fuzz_bodies::stream(&bad);
        }
    }
    // Most bytes of the RAM part are offsets, flags and fill bytes, whose change is detected.
    assert!(refused > 5000, "only {refused} of {} changes were refused", 3 * bytes.len());
}

/// The stream of a QEMU without pages, and two checkpoints behind it.
fn with_checkpoints() -> Vec<u8> {
    let mut out = captures::read("q72-none.gz");
    for _ in 0..2 {
        out.extend_from_slice(&ColoMessage::Request.encode());
        out.extend_from_slice(&ColoMessage::Send.encode());
        section::encode_end(2, &mut out);
        out.extend_from_slice(&EOS_RECORD);
        section::encode_footer(2, &mut out);
        section::encode_eof(&mut out);
        let mut state = Vec::new();
        let name = section::SectionName { id: 9, idstr: "timer", instance: 0, version: 2 };
        section::encode_full(&name, &mut state);
        state.extend_from_slice(&[7; 24]);
        section::encode_footer(9, &mut state);
        section::encode_eof(&mut state);
        encode_size(state.len() as u64, &mut out);
        out.extend_from_slice(&state);
    }
    out
}

/// Every single byte of a stream with checkpoints, changed, and the stream cut there.
#[test]
fn s79_every_byte_of_checkpoints_may_be_wrong() {
    let bytes = with_checkpoints();
    assert_eq!(fuzz_bodies::checkpoints(&bytes), 3);
    let front = captures::read("q72-none.gz").len();
    for at in 0..bytes.len() {
        assert!(fuzz_bodies::checkpoints(&bytes[..at]) < 3);
        let flips: &[u8] = if at < front { &[0x80] } else { &[0x01, 0x02, 0x80, 0xff] };
        for flip in flips {
            let mut bad = bytes.clone();
            bad[at] ^= flip;
            fuzz_bodies::checkpoints(&bad);
        }
    }
}

/// Multifd channels with a few changed bytes, most of them in the headers.
#[test]
fn s79_flipped_bytes_of_channels_are_refused_or_pass_within_bounds() {
    let captures: Vec<(Vec<u8>, Method)> =
        [("none", Method::Plain), ("zlib", Method::Zlib), ("zstd", Method::Zstd)]
            .into_iter()
            .flat_map(|(name, method)| {
                ["q72", "q100"]
                    .map(|qemu| (captures::read(&format!("{qemu}-microvm-multifd-{name}-ch0.gz")), method))
            })
            .collect();
    captures.iter().for_each(|(bytes, method)| fuzz_bodies::channel(bytes, *method));
    let config =
        Config { cases: 1000, rng_seed: RngSeed::Fixed(8), failure_persistence: None, ..Config::default() };
    let flips = prop::collection::vec((0..64 + 3 * 1344usize, any::<u8>()), 1..4);
    TestRunner::new(config)
        .run(&(0..captures.len(), flips), |(which, flips)| {
            let (bytes, method) = &captures[which];
            let mut bytes = bytes.clone();
            for (at, byte) in flips {
                let reach = bytes.len();
                bytes[at % reach] ^= byte;
            }
            fuzz_bodies::channel(&bytes, *method);
            Ok(())
        })
        .unwrap();
}

proptest! {
    #![proptest_config(Config::with_cases(4000))]
    /// Bytes that mostly look like run lengths: many decode, many fail in the middle.
    #[test]
    fn s34_what_a_delta_may_do_is_what_a_plain_reading_of_the_rules_does(
        data in prop::collection::vec(
            prop_oneof![
                8 => prop::sample::select(vec![0_u8, 1, 1, 2, 3, 4, 0x7f, 0x80, 0x81, 0x1f, 0x20, 0xff]),
                1 => any::<u8>(),
            ],
            0..80,
        ),
    ) {
        fuzz_bodies::xbzrle_page(&data);
    }
}
