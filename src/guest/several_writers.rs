//! Writers that no single source reports: a vCPU, a device thread and another process, in parallel.
//!
//! The other process is this test program again, started with [`ROLE`] in its environment so that only
//! [`second_process`] runs; it maps the guest's memory by the descriptor of its parent.
#![allow(clippy::unwrap_used)]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::race::{race_passes, store};
use super::{
    DirtySource, GuestMemory, KvmDirtyLog, KvmSlot, MappedGuest, SoftwareBitmap, VhostLog, WrittenPages,
};
use crate::ram::{BlockName, PageRun, RamBlock};
use crate::sys::testing::TestVm;
use crate::sys::{Mapping, SharedBitmap, WriteProtector};
use crate::units::{BlockIndex, BlockOffset, GuestAddr, PageIndex, PageSize};

/// Descriptors of the memory and of the log in the parent, which the second process opens by /proc.
const ROLE: &str = "RAMWIRE_TEST_SECOND_PROCESS";
const PAGES: u64 = 2048;
/// The second process's pages; the vCPU writes the first thousand, the device thread those between.
const THEIRS: std::ops::Range<u64> = 1400..2048;
const GUEST_ADDR: u64 = 0x10_0000;

/// The code of the other process: it writes its pages each time it receives a message, and logs them afterwards.
#[test]
fn second_process() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let mut fds = role.split(' ').map(|fd| {
        let path = format!("/proc/{}/fd/{fd}", std::os::unix::process::parent_id());
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    });
    let ram = Mapping::file(fds.next().unwrap().into(), 0, PAGES * 4096).unwrap();
    let log = fds.next().unwrap();
    let log = Mapping::file(log.try_clone().unwrap().into(), 0, log.metadata().unwrap().len()).unwrap();
    let log = SharedBitmap::new(log.region().clone()).unwrap();
    let uffd = WriteProtector::new().unwrap();
    println!("\nready {} {}", uffd.as_fd().as_raw_fd(), ram.region().address());
    for pass in std::io::stdin().lines() {
        for page in THEIRS {
            let bytes = pass.as_deref().unwrap().parse::<u64>().unwrap() << 32 | page;
            ram.region().span(page * 4096 + 64, 8).unwrap().copy_from(&bytes.to_le_bytes());
            let bit = GUEST_ADDR / 4096 + page;
            log.set(bit..bit + 1);
        }
        println!("\ndone");
    }
}

struct Second {
    child: Child,
    answers: BufReader<ChildStdout>,
    uffd: i32,
    address: usize,
}

impl Second {
    fn start(ram: &Mapping, log: &Mapping) -> Self {
        let fd = |mapping: &Mapping| mapping.backing().unwrap().0.as_raw_fd();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "guest::several_writers::second_process", "--nocapture"])
            .env(ROLE, format!("{} {}", fd(ram), fd(log)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        let mut second = Self { child, answers, uffd: 0, address: 0 };
        let ready = second.wait_for("ready ");
        let (uffd, address) = ready["ready ".len()..].split_once(' ').unwrap();
        (second.uffd, second.address) = (uffd.parse().unwrap(), address.parse().unwrap());
        second
    }

    fn wait_for(&mut self, word: &str) -> String {
        let found = (&mut self.answers).lines().map(Result::unwrap).find(|line| line.starts_with(word));
        found.unwrap_or_else(|| panic!("the second process ended without {word:?}"))
    }

    fn write_pages(&mut self, pass: u64) {
        writeln!(self.child.stdin.as_ref().unwrap(), "{pass}").unwrap();
        self.wait_for("done");
    }
}

impl Drop for Second {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        self.child.kill().ok();
        self.child.wait().unwrap();
    }
}

/// The guest's memory and a log for all of it, both to be shared; one block at `GUEST_ADDR`.
fn memory() -> (Mapping, Mapping, RamBlock) {
    let block = RamBlock::new(BlockName::new("ram").unwrap(), PAGES * 4096);
    let block = RamBlock { guest_addr: Some(GuestAddr(GUEST_ADDR)), ..block };
    let ram = Mapping::memfd("ram", PAGES * 4096).unwrap();
    (ram, Mapping::memfd("log", (GUEST_ADDR / 4096 + PAGES) / 8).unwrap(), block)
}

#[test]
fn a_vcpu_a_device_thread_and_a_second_process_at_once_lose_nothing() {
    let (ram, log, block) = memory();
    let guest = MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &ram).build().unwrap();
    let second = Mutex::new(Second::start(&ram, &log));
    let mut vm = TestVm::new();
    let slot = KvmSlot {
        slot: 0,
        guest_addr: GuestAddr(GUEST_ADDR),
        block: BlockIndex(0),
        offset: BlockOffset(0),
        len: PAGES * 4096,
        flags: 0,
    };
    vm.map(0, GUEST_ADDR, ram.region(), 0, slot.len);
    let marks = Arc::new(SoftwareBitmap::new(guest.table()));
    let kvm_log = Arc::new(KvmDirtyLog::new(&guest, vm.fd(), &[slot]).unwrap());
    let vhost_log = Arc::new(VhostLog::new(&guest, log.region().clone()));
    let vm = Mutex::new(vm);

    let pass = |pass: u64, synced: &AtomicU64| {
        std::thread::scope(|scope| {
            scope.spawn(|| vm.lock().unwrap().write_pages(GUEST_ADDR, 1000, (pass << 24) as u32));
            scope.spawn(|| second.lock().unwrap().write_pages(pass));
            for page in 1000..THEIRS.start {
                let run = PageRun { block: BlockIndex(0), first: PageIndex(page), pages: 1 };
                let mut stamp = [pass as u8; 16];
                stamp[8..].copy_from_slice(&(page + synced.load(Ordering::Relaxed)).to_le_bytes());
                store(&guest, run, stamp);
                marks.mark_run(run);
            }
        });
    };
    let all: [Arc<dyn DirtySource>; 3] = [kvm_log, marks.clone(), vhost_log];
    let outcome = race_passes(&guest, &all, 4, &pass).unwrap();
    assert!(outcome.lost == 0 && outcome.reported > 0, "{outcome:?}");

    // Every source is needed: without any one of them its writer's pages are lost.
    for (missing, pages) in [(0, 1000), (1, 400), (2, 648)] {
        let two: Vec<_> = (0..3).filter(|at| *at != missing).map(|at| all[at].clone()).collect();
        let outcome = race_passes(&guest, &two, 1, &|number, synced| {
            pass(20 + number + missing as u64, synced);
        });
        assert_eq!(outcome.unwrap().lost, pages, "without {}", all[missing].name());
    }
}

/// Another process's memory, tracked by that process's own userfaultfd and page map: its writes are reported, ours are
/// not.
#[test]
fn another_process_is_tracked_by_its_own_descriptors() {
    let (ram, log, block) = memory();
    let second = Second::start(&ram, &log);
    let pid = Pid::from_child(&second.child);
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    let uffd = pidfd_getfd(&pidfd, second.uffd, PidfdGetfdFlags::empty()).unwrap();
    let pagemap = File::open(format!("/proc/{}/pagemap", pid.as_raw_nonzero())).unwrap();
    let region = ram.region().clone().tracked_at(second.address);
    let guest = MappedGuest::builder(PageSize::SIZE_4K).region(block, region).build().unwrap();
    let source: Arc<dyn DirtySource> = Arc::new(WrittenPages::of_process(&guest, uffd, pagemap.into()));
    source.probe().unwrap();
    let second = Mutex::new(second);
    let pass = |pass: u64, _: &AtomicU64| second.lock().unwrap().write_pages(pass);
    let outcome = race_passes(&guest, std::slice::from_ref(&source), 3, &pass).unwrap();
    assert!(outcome.lost == 0, "{outcome:?}");
    // Writes by this process through its own mapping do not belong to that process.
    source.start().unwrap();
    store(&guest, PageRun { block: BlockIndex(0), first: PageIndex(3), pages: 1 }, [1; 16]);
    second.lock().unwrap().write_pages(9);
    let mut map = crate::ram::PageBitmap::new(PAGES);
    source.sync_into(BlockIndex(0), &mut map).unwrap();
    assert_eq!(map.next_run(PageIndex(0), PAGES), Some(THEIRS));
    assert_eq!(map.count(), THEIRS.end - THEIRS.start);
}
