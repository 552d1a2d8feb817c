#![allow(clippy::unwrap_used)]
use std::time::{Duration, Instant};

use super::*;
use crate::guest::race::{Follower, guest_of};
use crate::guest::{DirtySource, WrittenPages};
use crate::sys::Mapping;
use crate::sys::testing::has_huge_pages;
use crate::units::PageSize;

fn blocks() -> Arc<MappedGuest> {
    let third = match has_huge_pages(PageSize::SIZE_2M, 16) {
        true => Mapping::memfd_huge("huge", 4 << 20, PageSize::SIZE_2M),
        false => Mapping::memfd("small", 4 << 20),
    };
    Arc::new(guest_of(&[
        Mapping::anonymous(4 << 20).unwrap(),
        Mapping::memfd("odd", 4096 * 101).unwrap(),
        third.unwrap(),
        Mapping::anonymous(4096).unwrap(),
    ]))
}

fn config(rate: Option<Rate>) -> SyntheticConfig {
    SyntheticConfig { seed: 7, working_set: 2 << 20, rate, writers: 3, ..SyntheticConfig::default() }
}

/// Seconds are enough normally. But a virtual machine's CPU may be stopped for longer, and with it the writers that
/// sleep there.
const LIMIT: Duration = Duration::from_secs(120);

fn run_until(guest: &SyntheticGuest, pages: u64) {
    let until = Instant::now() + LIMIT;
    while guest.pages_written() < pages {
        let written = || guest.clone().vcpu_dirty_pages();
        assert!(Instant::now() < until, "{:?} of {pages} pages written", written());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Runs until each writer has written all its pages once more, however unevenly they are scheduled.
fn run_a_lap(guest: &SyntheticGuest) {
    let mut guest = guest.clone();
    let goal: Vec<u64> = (0..)
        .zip(guest.vcpu_dirty_pages())
        .map(|(writer, done)| done + guest.with(|machine| machine.unwrap().shared.plan.pages_of(writer)))
        .collect();
    let until = Instant::now() + LIMIT;
    while guest.vcpu_dirty_pages().iter().zip(&goal).any(|(done, goal)| done < goal) {
        assert!(Instant::now() < until, "{:?} of {goal:?} pages written", guest.vcpu_dirty_pages());
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Copies all memory, like a migration whose rounds are over.
fn copy(from: &MappedGuest, to: &MappedGuest) {
    for (block, ram, region) in from.regions() {
        let mut bytes = vec![0; ram.used_length as usize];
        region.span(0, ram.used_length).unwrap().copy_to(&mut bytes);
        to.region(block).unwrap().span(0, ram.used_length).unwrap().copy_from(&bytes);
    }
}

fn moved(source: &mut SyntheticGuest) -> SyntheticGuest {
    let mut target = SyntheticGuest::empty(blocks());
    copy(source.memory(), target.memory());
    let mut devices = Vec::new();
    let told = source.size();
    source.save(&mut devices).unwrap();
    assert_eq!(told, devices.len() as u64, "what the switchover counts with is what it sends");
    target.load(&mut devices.as_slice()).unwrap();
    target
}

#[test]
fn a_guest_is_whole_at_every_pause() {
    let mut guest = SyntheticGuest::filled(blocks(), config(None)).unwrap();
    let report = guest.verify().unwrap();
    assert!(report.is_whole() && report.written == 0, "{report:?}");
    assert!(report.zero > report.pages / 8 && report.filled > report.pages / 2, "{report:?}");
    for _ in 0..5 {
        guest.resume().unwrap();
        run_a_lap(&guest);
        guest.pause().unwrap();
        let written = guest.pages_written();
        let report = guest.verify().unwrap();
        assert!(report.is_whole() && report.written > 400, "{report:?}");
        assert_eq!(report.zero + report.filled + report.written, report.pages);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(guest.pages_written(), written, "a paused guest writes nothing");
    }
}

#[test]
fn one_seed_fills_the_same_bytes_and_another_does_not() {
    let fill = |seed| {
        let guest = SyntheticGuest::filled(blocks(), SyntheticConfig { seed, ..config(None) }).unwrap();
        let mut bytes = vec![0; 4 << 20];
        guest.memory().region(BlockIndex(0)).unwrap().span(0, 4 << 20).unwrap().copy_to(&mut bytes);
        bytes
    };
    assert!(fill(7) == fill(7) && fill(7) != fill(8));
}

#[test]
fn what_is_asked_of_a_running_or_stateless_guest_is_refused() {
    let mut guest = SyntheticGuest::filled(blocks(), config(Some(Rate(0)))).unwrap();
    guest.resume().unwrap();
    assert!(guest.verify().is_err() && guest.save(&mut Vec::new()).is_err());
    guest.pause().unwrap();
    assert_eq!(guest.pages_written(), 0, "rate 0 is an idle guest");
    guest.save(&mut Vec::new()).unwrap();
    let mut empty = SyntheticGuest::empty(blocks());
    assert!(empty.resume().is_err() && empty.pause().is_err() && empty.verify().is_err());
}

/// A page that missed the last round is found although it is complete, by the page and by the writer's count.
#[test]
fn a_lost_last_write_a_torn_page_and_a_foreign_one_are_named() {
    let mut source = SyntheticGuest::filled(blocks(), config(None)).unwrap();
    source.resume().unwrap();
    run_until(&source, 2000);
    source.pause().unwrap();
    let mut before = vec![0; 4 << 20];
    source.memory().region(BlockIndex(0)).unwrap().span(0, 4 << 20).unwrap().copy_to(&mut before);
    source.resume().unwrap();
    run_until(&source, source.pages_written() + 2000);
    source.pause().unwrap();
    let target = moved(&mut source);
    assert!(target.verify().unwrap().is_whole());

    let ram = target.memory().region(BlockIndex(0)).unwrap();
    let mut now = vec![0; 4 << 20];
    ram.span(0, 4 << 20).unwrap().copy_to(&mut now);
    let changed = (0..1024).find(|page| now[page * 4096..][..4096] != before[page * 4096..][..4096]).unwrap();
    ram.span(changed as u64 * 4096, 4096).unwrap().copy_from(&before[changed * 4096..][..4096]);
    let report = target.verify().unwrap();
    assert_eq!((report.wrong, report.faults.len()), (1, 1), "{report:?}");
    assert_eq!((report.faults[0].block.as_str(), report.faults[0].page.0), ("b0", changed as u64));
    assert!(report.faults[0].to_string().ends_with("(an older copy)"), "{}", report.faults[0]);

    let mut torn = now[changed * 4096..][..4096].to_vec();
    torn[2000..].copy_from_slice(&before[changed * 4096 + 2000..][..2096]);
    ram.span(changed as u64 * 4096, 4096).unwrap().copy_from(&torn);
    assert_eq!(target.verify().unwrap().faults[0].found, Content::Torn);
    ram.span(changed as u64 * 4096, 4096).unwrap().copy_from(&[0x55; 4096]);
    assert_eq!(target.verify().unwrap().faults[0].found, Content::Foreign);
    ram.span(changed as u64 * 4096, 4096).unwrap().fill_zero();
    assert_eq!(target.verify().unwrap().faults[0].found, Content::Zero);
}

/// Faults stay visible after the resumed guest has written over every page of its working set.
#[test]
fn a_resumed_guest_checks_what_it_overwrites() {
    let mut source = SyntheticGuest::filled(blocks(), config(None)).unwrap();
    source.resume().unwrap();
    run_a_lap(&source);
    source.pause().unwrap();
    let mut target = moved(&mut source);
    target.resume().unwrap();
    run_a_lap(&target);
    target.pause().unwrap();
    assert!(target.verify().unwrap().is_whole());

    let mut target = moved(&mut source);
    let (block, page) = target.with(|machine| machine.unwrap().shared.plan.place(1, 5)).unwrap();
    let stale = target.memory().region(BlockIndex(block)).unwrap().span(page * 4096, 4096).unwrap();
    stale.fill_zero();
    target.resume().unwrap();
    run_a_lap(&target);
    target.pause().unwrap();
    let report = target.verify().unwrap();
    assert_eq!((report.wrong, report.faults[0].page.0), (1, page), "{report:?}");
}

/// The guest, tracked and copied while it runs at full speed, arrives intact.
#[test]
fn a_running_guest_followed_by_its_dirty_pages_arrives_whole() {
    if !crate::sys::testing::has_userfaultfd() {
        return;
    }
    let memory = blocks();
    let mut guest = SyntheticGuest::filled(memory.clone(), config(None)).unwrap();
    let trackers: [Arc<dyn DirtySource>; 2] = [Arc::new(WrittenPages::new(&*memory)), guest.software()];
    for source in trackers {
        guest.resume().unwrap();
        let sources = [source];
        let mut follower = Follower::new(&memory);
        sources[0].start().unwrap();
        follower.copy_all();
        for _ in 0..20 {
            follower.sync(&sources).unwrap();
        }
        guest.pause().unwrap();
        follower.sync(&sources).unwrap();
        assert_eq!(follower.differing(), 0, "{}", sources[0].name());
        sources[0].stop().unwrap();
    }
}

#[test]
fn rate_and_throttle_hold_the_writers_back() {
    // 8 MiB/s are 2048 pages a second, by three writers.
    const RATE: f64 = 2048.0;
    /// How far each writer may be ahead or catch up: 20 ms of its rate, and the page at which it pauses.
    const BURST: f64 = RATE / 3.0 * 0.02 + 1.0;
    let mut guest = SyntheticGuest::filled(blocks(), config(Some(Rate(8 << 20)))).unwrap();
    // A busy machine takes longer, never less.
    let seconds_for = |guest: &mut SyntheticGuest, pages, share| {
        guest.throttle(Percent::new(share).unwrap());
        let (until, begun) = (guest.pages_written() + pages, Instant::now());
        guest.resume().unwrap();
        run_until(guest, until);
        guest.pause().unwrap();
        begun.elapsed().as_secs_f64()
    };
    let free = seconds_for(&mut guest, 600, 0);
    assert!(free >= (600.0 - 3.0 * BURST) / RATE, "{free}");
    let slow = seconds_for(&mut guest, 60, 95);
    assert!(slow >= (60.0 - 3.0 * BURST) / (RATE * 0.05), "{slow}");
    guest.throttle(Percent::default());
    let before = guest.vcpu_dirty_pages();
    guest.throttle_vcpu(0, RestShare::new(9900));
    let took = seconds_for(&mut guest, 600, 0);
    let ran: Vec<u64> = guest.vcpu_dirty_pages().iter().zip(&before).map(|(now, then)| now - then).collect();
    assert!(ran[0] as f64 <= took * RATE / 3.0 * 0.01 + BURST, "{ran:?} in {took} s");
}

/// Readers compare pages that no writer writes, and the first writes of a guest that had written none compare too.
#[test]
fn the_threads_of_an_arrived_guest_find_what_is_wrong_while_it_runs() {
    let mut source = SyntheticGuest::filled(blocks(), config(None)).unwrap();
    let mut devices = Vec::new();
    source.save(&mut devices).unwrap();
    let written = |block, page| source.with(|machine| machine.unwrap().shared.plan.is_written(block, page));
    let wrong = [true, false].map(|kind| (0..1024).find(|page| written(0, *page) == kind).unwrap());
    for spoil in [&[][..], &wrong[..1], &wrong[1..]] {
        let mut target = SyntheticGuest::empty(blocks()).reading();
        copy(source.memory(), target.memory());
        for page in spoil {
            let ram = target.memory().region(BlockIndex(0)).unwrap();
            ram.span(page * 4096, 4096).unwrap().copy_from(&[9; 4096]);
        }
        target.load(&mut devices.as_slice()).unwrap();
        assert!(!target.is_read() && target.pages_read() == 0);
        target.resume().unwrap();
        run_a_lap(&target);
        let until = Instant::now() + LIMIT;
        while !target.is_read() {
            assert!(Instant::now() < until, "{} pages read", target.pages_read());
            std::thread::sleep(Duration::from_millis(1));
        }
        target.pause().unwrap();
        let report = target.verify().unwrap();
        assert_eq!(target.pages_read(), report.pages);
        let found: Vec<u64> = report.faults.iter().map(|fault| fault.page.0).collect();
        assert!(spoil.iter().all(|page| found.contains(page)), "{found:x?} of {spoil:x?}");
        assert_eq!(report.is_whole(), spoil.is_empty());
    }
}
