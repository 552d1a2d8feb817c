//! Every capture parses to the result in its manifest, for any split of the bytes.

use std::collections::BTreeMap;

use ramwire::stream::qemu::incoming::Ending;

use super::captures::{self, Device, Promise, sha256};
use super::replay::Replay;

#[test]
fn captures_are_what_the_manifest_says() {
    for (name, promise) in captures::manifest() {
        let file =
            promise.file.iter().map(|file| (file.clone(), promise.raw_len, promise.raw_sha256.clone()));
        let parts =
            promise.parts.iter().map(|part| (part.file.clone(), part.raw_len, part.raw_sha256.clone()));
        for (file, raw_len, raw_sha256) in file.chain(parts) {
            let bytes = captures::read(&file);
            assert_eq!((bytes.len(), sha256(&bytes)), (raw_len, raw_sha256), "{name}: {file}");
        }
    }
}

#[test]
fn s01_to_s34_whole_streams_give_the_promised_counts_devices_and_memory() {
    let streams = captures::whole_streams();
    assert!(streams.len() >= 15, "only {} captures found", streams.len());
    for (name, promise, bytes) in &streams {
        let mut replay = Replay::new();
        replay.feed(bytes, 256 << 10).unwrap_or_else(|error| panic!("{name}: {error}"));
        check(name, promise, &replay, bytes);
    }
}

fn check(name: &str, promise: &Promise, replay: &Replay, bytes: &[u8]) {
    assert!(replay.done, "{name}: no end was found");
    assert_eq!(replay.stream.finish(), Ok(Ending::Whole), "{name}");
    assert_eq!(replay.stream.position(), bytes.len() as u64, "{name}: bytes are left over");
    let machine = replay.stream.configuration().map(|configuration| configuration.machine.clone());
    assert_eq!(machine, promise.machine, "{name}");
    assert_eq!(replay.stream.ram_section_id(), promise.ram_section_id, "{name}");
    assert_eq!(replay.first_device_offset, promise.first_device_offset, "{name}");
    let mut counts: BTreeMap<String, u64> = promise.counts.clone();
    counts.remove("newblk");
    let found: BTreeMap<String, u64> = replay.counts.iter().map(|(k, v)| ((*k).to_owned(), *v)).collect();
    assert_eq!(found, counts, "{name}");
    check_devices(name, promise, replay);
    let multifd = name.contains("multifd");
    for (block, promised) in promise.blocks.iter().flatten().filter(|_| !multifd) {
        let index = replay.stream.blocks().find(block).unwrap_or_else(|| panic!("{name}: no block {block}"));
        let memory = &replay.memory[index.as_usize()];
        assert_eq!((memory.len(), &sha256(memory)), (promised.len, &promised.sha256), "{name}: {block}");
    }
}

fn check_devices(name: &str, promise: &Promise, replay: &Replay) {
    let description = replay.stream.tail().description().unwrap();
    assert!(description.split.is_exact(), "{name}: {:?}", description.split.unreliable);
    let found: Vec<Device> = description
        .split
        .sections
        .iter()
        .map(|section| Device {
            name: section.name.clone(),
            instance: section.instance,
            section_id: section.id,
            version: section.version,
            payload_len: section.payload.len(),
        })
        .collect();
    assert_eq!(found, promise.devices, "{name}");
    assert_eq!(replay.tail, replay.stream.tail().bytes(), "{name}");
}

#[test]
fn the_size_of_the_pieces_changes_nothing() {
    for (name, promise, bytes) in captures::whole_streams() {
        // Byte by byte takes too long for files of megabytes.
        let rooms: &[usize] = if bytes.len() < 400_000 { &[1, 7, 4104, 70_000] } else { &[4104, 70_000] };
        for room in rooms {
            let mut replay = Replay::new();
            replay.feed(&bytes, *room).unwrap_or_else(|error| panic!("{name} in pieces of {room}: {error}"));
            check(&name, &promise, &replay, &bytes);
        }
    }
}

#[test]
fn s15_bytes_behind_the_end_are_left_alone() {
    for (name, promise, bytes) in captures::whole_streams() {
        let mut replay = Replay::new();
        let longer = [&bytes[..], b"\0\x06\0\0\0\x02{}QEVM"].concat();
        replay.feed(&longer, 1 << 20).unwrap();
        check(&name, &promise, &replay, &bytes);
    }
}
