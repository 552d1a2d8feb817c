//! RDMA READs on the simulated network: seeded histories that must hold, and rules broken on purpose that must be found.

#![allow(clippy::unwrap_used)]

mod pair;

use std::sync::Arc;
use std::time::Duration;

use super::world::Breakage;
use super::*;
use crate::fabric::{CompletionStatus, Operation};
use crate::region::RegionMemory;
use pair::{Pair, Pull, bytes_of};

const PAGE: u64 = 4096;
const PAGES: u64 = 24;
const BYTES: u64 = PAGES * PAGE;
const SEEDS: u64 = 100;
const MUTANT_SEEDS: u64 = 1000;
/// Longer than anything takes.
const LONG: Duration = Duration::from_secs(20);

const READABLE: [&[Access]; 2] = [&[Access::RemoteRead], &[Access::LocalWrite]];

/// Everything is pulled over two queue pairs, as many READs at a time as were agreed.
fn pulls_all(seed: u64, breakage: Breakage) -> Result<(), String> {
    let mut pair = Pair::new(seed, breakage, 2, READABLE, &[]);
    let depth = pair.pullers[0].limits().reads.own;
    let allowed = pair.servers[0].limits().reads.served;
    Pair::check(depth == allowed && depth > 0, || {
        format!("{depth} READs at a time, the peer serves {allowed}")
    })?;
    let mut under_way: [Vec<Pull>; 2] = [(); 2].map(|()| Vec::new());
    let mut at = 0;
    while at < BYTES || under_way.iter().any(|pulls| !pulls.is_empty()) {
        let lane = pair.random.below(2) as usize;
        let room = usize::from(depth) - under_way[lane].len();
        let mut chain = Vec::new();
        for _ in 0..pair.random.below(room as u64 + 1) {
            let bytes = (1 + pair.random.below(3 * PAGE)).min(BYTES - at);
            if bytes > 0 {
                chain.push(pair.pull(at, bytes));
                at += bytes;
            }
        }
        pair.post(lane, pair.key(), &chain).map_err(|error| error.to_string())?;
        under_way[lane].extend(chain);
        if under_way[lane].len() == usize::from(depth) {
            let more = pair.pull(0, 1);
            let refused = pair.post(lane, pair.key(), &[more]);
            let is_refused = matches!(refused, Err(FabricError::ReadDepth { asked: 1, .. }));
            Pair::check(is_refused, || format!("a READ more than {depth}: {refused:?}"))?;
        }
        if !under_way[lane].is_empty() {
            for completion in pair.completions(lane) {
                let Completion::Done { id } = completion else { return Err(format!("{completion:?}")) };
                let first = under_way[lane].remove(0);
                Pair::check(first.id == id, || format!("READ {id} completed before {}", first.id))?;
                pair.is_in_place(&first)?;
            }
        }
    }
    Pair::check(pair.ram.first_difference(&pair.copy).is_none(), || "memories differ".into())
}

/// One READ among others is one that a device refuses.
fn refuses(seed: u64, breakage: Breakage) -> Result<(), String> {
    let kind = seed % 6;
    let rights: [&[Access]; 2] = match kind {
        0 => [&[Access::RemoteWrite], &[Access::LocalWrite]],
        1 => [&[Access::RemoteWrite, Access::RemoteRead], &[Access::RemoteRead]],
        _ => READABLE,
    };
    let mut pair = Pair::new(seed, breakage, 1, rights, &[]);
    let depth = u64::from(pair.pullers[0].limits().reads.own);
    let count = 1 + pair.random.below(depth);
    let bad = pair.random.below(count) as usize;
    let mut pulls: Vec<Pull> = (0..count).map(|index| pair.pull(index * PAGE, PAGE)).collect();
    let key = pair.key();
    let wrong_rights = kind < 2;
    let expected = match kind {
        0 => CompletionStatus::RemoteAccess,
        1 => CompletionStatus::LocalProtection,
        // Beyond the end, by a byte or more; before the start; beyond the end of own memory.
        2 => {
            pulls[bad].offset = BYTES - PAGE + 1 + pair.random.below(PAGE);
            CompletionStatus::RemoteAccess
        }
        3 => {
            pulls[bad].offset = 0_u64.wrapping_sub(1 + pair.random.below(PAGE));
            CompletionStatus::RemoteAccess
        }
        4 => {
            let last = pulls[bad].pieces.last_mut().unwrap();
            last.to = pair.target.address + BYTES - u64::from(last.len) + 1;
            CompletionStatus::LocalProtection
        }
        _ => {
            pair.served = None;
            CompletionStatus::RemoteAccess
        }
    };
    pair.post(0, key, &pulls).map_err(|error| error.to_string())?;
    let (done, failed) = pair.settle(0, &pulls)?;
    let wanted = if wrong_rights || kind == 5 { 0 } else { bad };
    Pair::check((done, failed) == (wanted, Some(expected)), || {
        format!("{done} READs, then {failed:?}; READ {wanted} is to fail with {expected:?}")
    })?;
    // The queue pair is broken for good.
    let later = pair.pull(0, PAGE);
    if pair.pullers[0].limits().reads.own as usize > pulls.len() - done {
        pair.post(0, key, &[later]).map_err(|error| error.to_string())?;
        let found = pair.completions(0);
        let flushed =
            Completion::Failed { operation: Operation::Read, status: CompletionStatus::Flushed, vendor: 0 };
        Pair::check(found == [flushed], || format!("{found:?} on a broken queue pair"))?;
    }
    Ok(())
}

/// The key is taken back while READs are under way, and the memory is then used for something else.
fn is_revoked(seed: u64, breakage: Breakage) -> Result<(), String> {
    let mut pair = Pair::new(seed, breakage, 1, READABLE, &[]);
    let count = u64::from(pair.pullers[0].limits().reads.own);
    let pulls: Vec<Pull> = (0..count).map(|index| pair.pull(index * 2 * PAGE, 2 * PAGE)).collect();
    pair.post(0, pair.key(), &pulls).map_err(|error| error.to_string())?;
    let wait = Duration::from_micros(pair.random.below(500));
    pair.servers[0].wait(wait).unwrap();
    let before = bytes_of(&pair.ram, 0, BYTES);
    pair.served = None;
    pair.ram.write(0, &vec![0xee; BYTES as usize]);
    let mut completed = Vec::new();
    while completed.len() < pulls.len() {
        let found = pair.completions(0);
        Pair::check(!found.is_empty(), || "READs that never end".into())?;
        completed.extend(found);
    }
    for (pull, completion) in pulls.iter().zip(&completed) {
        if let Completion::Done { .. } = completion {
            let got = bytes_of(&pair.copy, pull.offset, pull.bytes());
            let wanted = &before[pull.offset as usize..(pull.offset + pull.bytes()) as usize];
            Pair::check(got == wanted, || format!("{pull:?} brought memory whose key is dead"))?;
        }
    }
    let failure = completed.iter().find(|found| !matches!(found, Completion::Done { .. }));
    let refused = |found: &Completion| {
        matches!(found, Completion::Failed { status: CompletionStatus::RemoteAccess, .. })
    };
    Pair::check(failure.is_none_or(refused), || format!("{failure:?}"))
}

/// The end of an answer is lost for good.
fn is_cut(seed: u64, breakage: Breakage) -> Result<(), String> {
    let request = seed % 4;
    let mut pair = Pair::new(seed, breakage, 1, READABLE, &[(Host::B, Fault::AnswerCut { request })]);
    let count = u64::from(pair.pullers[0].limits().reads.own);
    let pulls: Vec<Pull> = (0..count).map(|index| pair.pull(index * PAGE, PAGE)).collect();
    pair.post(0, pair.key(), &pulls).map_err(|error| error.to_string())?;
    let (done, failed) = pair.settle(0, &pulls)?;
    let wanted = if request < count {
        (request as usize, Some(CompletionStatus::RetryExceeded))
    } else {
        (count as usize, None)
    };
    Pair::check((done, failed) == wanted, || format!("{done} READs, then {failed:?}"))
}

/// A device goes away while READs are under way: this end's, or the peer's.
fn device_goes(seed: u64, breakage: Breakage) -> Result<(), String> {
    let own = seed.is_multiple_of(2);
    let fault = match own {
        true => (Host::B, Fault::DeviceRemoved { request: 1 }),
        false => (Host::A, Fault::DeviceRemoved { request: 0 }),
    };
    let mut pair = Pair::new(seed, breakage, 2, READABLE, &[fault]);
    let pull = pair.pull(0, 8 * PAGE);
    pair.post(0, pair.key(), std::slice::from_ref(&pull)).map_err(|error| error.to_string())?;
    let wait = Duration::from_micros(pair.random.below(600));
    pair.servers[0].wait(wait).unwrap();
    let gone = match own {
        true => {
            let more = pair.pull(0, PAGE);
            pair.post(1, pair.key(), &[more])
        }
        false => pair.servers[1].post_send(1, &[b"x"]),
    };
    Pair::check(matches!(gone, Err(FabricError::DeviceRemoved)), || format!("{gone:?}"))?;
    if own {
        let link = pair.pullers[0].link().unwrap();
        Pair::check(link == LinkState::DeviceRemoved, || format!("{link:?}"))?;
        // What was read is the owner's again.
        let before = bytes_of(&pair.copy, 0, BYTES);
        pair.servers[0].wait(LONG).unwrap();
        Pair::check(before == bytes_of(&pair.copy, 0, BYTES), || "memory changed without a device".into())?;
    }
    pair.settle(0, &[pull]).map(|_| ())
}

type Scenario = fn(u64, Breakage) -> Result<(), String>;

const SCENARIOS: [(&str, Scenario); 5] = [
    ("pulls all", pulls_all),
    ("refuses", refuses),
    ("is revoked", is_revoked),
    ("is cut", is_cut),
    ("a device goes", device_goes),
];

#[test]
fn reads_keep_their_rules_whatever_the_order_and_whatever_breaks() {
    for seed in 0..SEEDS {
        for (name, scenario) in SCENARIOS {
            if let Err(why) = scenario(seed, Breakage::None) {
                panic!("{name}, seed {seed}: {why}");
            }
        }
    }
}

#[test]
fn each_rule_of_reads_broken_is_found() {
    for breakage in Breakage::ALL {
        let found = (0..MUTANT_SEEDS).find_map(|seed| {
            let broken =
                |(name, scenario): (&'static str, Scenario)| Some((name, scenario(seed, breakage).err()?));
            SCENARIOS.into_iter().find_map(broken).map(|(name, why)| (seed, name, why))
        });
        let (seed, name, why) = found.unwrap_or_else(|| panic!("{breakage:?}: not found"));
        println!("{breakage:?}: found by {name}, seed {seed}: {why}");
    }
}

/// What a READ sees of a write on the same queue pair, over seeds: whether it was `[old, new, mixed]`.
fn seen(write_first: bool) -> [bool; 3] {
    let mut seen = [false; 3];
    for seed in 0..SEEDS {
        let writable: &[Access] = &[Access::RemoteRead, Access::RemoteWrite];
        let mut pair = Pair::new(seed, Breakage::None, 1, [writable, &[Access::LocalWrite]], &[]);
        let newer = Arc::new(SparseMemory::new(PAGE));
        newer.write(0, &[0xff; PAGE as usize]);
        let local =
            pair.pullers[0].register(&HostRegion::new(newer), &[Access::Read], AddressBase::Host).unwrap();
        let (rkey, to) = pair.key();
        let (lkey, from, len) = (local.lkey, local.address, PAGE as u32);
        let mut pull = pair.pull(0, PAGE);
        let id = if write_first { 1 } else { 3 };
        pull.id = 2;
        let write = WriteRequest { id, lkey, from, len, rkey, to, signalled: true };
        if write_first {
            pair.pullers[0].post_writes(&[write]).unwrap();
        }
        pair.post(0, (rkey, to), &[pull]).unwrap();
        if !write_first {
            pair.pullers[0].post_writes(&[write]).unwrap();
        }
        let mut found = Vec::new();
        while found.len() < 2 {
            found.extend(pair.completions(0));
        }
        let done: Vec<_> = if write_first { vec![1, 2] } else { vec![2, 3] };
        assert_eq!(found, done.into_iter().map(|id| Completion::Done { id }).collect::<Vec<_>>());
        let got = bytes_of(&pair.copy, 0, PAGE);
        let new = got.iter().filter(|byte| **byte == 0xff).count() as u64;
        seen[if new == 0 {
            0
        } else if new == PAGE {
            1
        } else {
            2
        }] = true;
    }
    seen
}

#[test]
fn a_read_sees_all_writes_before_it_and_perhaps_some_of_one_after_it() {
    assert_eq!(seen(true), [false, true, false]);
    assert_eq!(seen(false), [true, true, true]);
}
