//! Memory that the kernel can no longer supply: a mapped file was truncated, a file system is full and the page is a
//! hole, or the pool of huge pages is exhausted. A read or store there raises SIGBUS, which ends the process.
//!
//! After a call of [`survive_lost_memory`] the kernel's refusal yields zero pages instead, and the region reports it
//! ([`HostRegion::loss`]), which ends a migration of it before COMMIT. This is a signal handler for the whole process,
//! so it is the program's choice: the library never installs it. It handles faults in memory that a [`HostRegion`]
//! holds and passes any other on to the previous handler. Without it a truncated file is still detected between two
//! slices by its length.
//!
//! # Source
//! mmap(2) (SIGBUS), sigaction(2) (`si_addr`, `si_code`, `BUS_MCEERR_AR`), signal-safety(7).

use crate::sys::Lock as _;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};

use rustix::fs::fstat;

use super::HostRegion;
use super::untouched::Backing;

/// How a region lost memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Loss {
    /// Its backing file was truncated.
    #[error("the file behind it ends after {left} of its {of} bytes")]
    Shortened {
        /// Bytes of the region that the file still has.
        left: u64,
        /// Bytes of the region.
        of: u64,
    },
    /// The kernel had no page to supply.
    #[error(
        "the kernel has no page for byte {at:#x}: its file was made shorter, or its file system or pool of huge pages is full"
    )]
    NoPage {
        /// Bytes from the region's start.
        at: u64,
    },
}

/// Addresses whose faults are handled. Entries are never freed, only reused: the handler walks them without a lock.
struct Entry {
    start: AtomicUsize,
    /// 0: not in use.
    len: AtomicUsize,
    page: AtomicUsize,
    /// The address of the first fault; 0: none.
    lost: AtomicUsize,
    next: AtomicPtr<Entry>,
}

static FIRST: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
static UNUSED: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());

/// Faults of a range are handled until this is dropped.
pub(super) struct Watched(&'static Entry);

impl Watched {
    pub(super) fn new(start: usize, len: usize, page: usize) -> Self {
        let free = UNUSED.locked().pop();
        let entry = free.unwrap_or_else(Entry::leaked);
        entry.start.store(start, Ordering::Relaxed);
        entry.page.store(page, Ordering::Relaxed);
        entry.lost.store(0, Ordering::Relaxed);
        // From here on the handler sees the entry.
        entry.len.store(len, Ordering::Release);
        Self(entry)
    }

    fn lost_at(&self) -> Option<u64> {
        let lost = self.0.lost.load(Ordering::Acquire);
        (lost != 0).then(|| (lost - self.0.start.load(Ordering::Relaxed)) as u64)
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.0.len.store(0, Ordering::Release);
        UNUSED.locked().push(self.0);
    }
}

impl Entry {
    /// Allocates an entry and adds it at the head of the list.
    fn leaked() -> &'static Self {
        let entry: &'static Self = Box::leak(Box::new(Self {
            start: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            page: AtomicUsize::new(0),
            lost: AtomicUsize::new(0),
            next: AtomicPtr::new(ptr::null_mut()),
        }));
        let mut first = FIRST.load(Ordering::Acquire);
        loop {
            entry.next.store(first, Ordering::Relaxed);
            let own = ptr::from_ref(entry).cast_mut();
            match FIRST.compare_exchange_weak(first, own, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return entry,
                Err(other) => first = other,
            }
        }
    }

    /// The entry that contains `address`.
    fn of(address: usize) -> Option<&'static Self> {
        let mut at = FIRST.load(Ordering::Acquire);
        // SAFETY: entries come from `leaked`, which never frees them, or are null.
        while let Some(entry) = unsafe { at.as_ref() } {
            let len = entry.len.load(Ordering::Acquire);
            let start = entry.start.load(Ordering::Relaxed);
            if address.checked_sub(start).is_some_and(|offset| offset < len) {
                return Some(entry);
            }
            at = entry.next.load(Ordering::Acquire);
        }
        None
    }
}

impl HostRegion {
    /// How the memory was lost since it was mapped: its file was truncated, or the kernel had no page for it (known
    /// only after [`survive_lost_memory`]). Bytes read from it since then can't be trusted.
    pub fn loss(&self) -> Option<Loss> {
        if let Some(at) = self.watched().lost_at() {
            return Some(Loss::NoPage { at });
        }
        let Backing::File(file, start) = self.backing() else { return None };
        let file_len = u64::try_from(fstat(&**file).ok()?.st_size).unwrap_or(0);
        let left = file_len.saturating_sub(*start);
        (left < self.len()).then(|| Loss::Shortened { left, of: self.len() })
    }
}

/// The previous handler; set before ours is installed.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();
static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();

/// From here on a SIGBUS in memory of a [`HostRegion`] maps a zero page there and continues; [`HostRegion::loss`]
/// reports it. It applies to the whole process and is called once. A SIGBUS anywhere else, or by a hardware error, goes
/// to the previous handler.
///
/// A running guest then continues with the zero page, where it would otherwise have died with the process: its program
/// must check [`HostRegion::loss`] and stop it.
///
/// # Errors
/// The error of sigaction(2).
pub fn survive_lost_memory() -> io::Result<()> {
    let install = || {
        // SAFETY: a sigaction of zeros is one without flags and with an empty mask.
        let mut before: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: only queries the current handler.
        if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &raw mut before) } != 0 {
            return Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL));
        }
        let _ = BEFORE.set(before);
        // SAFETY: as above.
        let mut ours: libc::sigaction = unsafe { std::mem::zeroed() };
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_bus_error;
        ours.sa_sigaction = handler as libc::sighandler_t;
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the handler makes only calls that are safe in a signal handler, and stays for the process's life.
        match unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
    };
    INSTALLED.get_or_init(install).map_err(io::Error::from_raw_os_error)
}

/// Runs in a signal handler: atomics and mmap(2) alone.
extern "C" fn on_bus_error(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo to a handler with SA_SIGINFO; for SIGBUS it holds an address.
    let (address, code) = unsafe { ((*info).si_addr() as usize, (*info).si_code) };
    if code == libc::BUS_ADRERR
        && let Some(entry) = Entry::of(address)
        && put_zero_page(
            address & !(entry.page.load(Ordering::Relaxed) - 1),
            entry.page.load(Ordering::Relaxed),
        )
    {
        let _ = entry.lost.compare_exchange(0, address, Ordering::AcqRel, Ordering::Relaxed);
        return;
    }
    pass_on(signal, info, context);
}

/// Maps zeros over the page at `start`; false if the kernel refuses.
fn put_zero_page(start: usize, len: usize) -> bool {
    let (protection, flags) = (
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
    );
    // SAFETY: errno is the thread's own; it is restored, since the interrupted code may be about to read it.
    let errno = unsafe { *libc::__errno_location() };
    // SAFETY: the page is in memory of a region, which its owner keeps mapped and holds only guest bytes. The kernel has
    // just refused to give it.
    let mapped = unsafe { libc::mmap(start as *mut _, len, protection, flags, -1, 0) };
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    mapped != libc::MAP_FAILED
}

fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let before = BEFORE.get();
    match before.map_or(libc::SIG_DFL, |before| before.sa_sigaction) {
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: restores the default action; the instruction is executed again, and ends the process as it would
            // have.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        handler if before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0) => {
            // SAFETY: it was installed as a handler of this kind.
            let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                unsafe { std::mem::transmute(handler) };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: it was installed as a handler of this kind.
            let handler: extern "C" fn(i32) = unsafe { std::mem::transmute(handler) };
            handler(signal);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::fs::File;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Stdio};

    use super::*;
    use crate::sys::Mapping;

    const PAGE: u64 = 4096;

    fn file(pages: u64) -> (File, Mapping) {
        let file = tempfile::tempfile().unwrap();
        file.set_len(pages * PAGE).unwrap();
        let mapping = Mapping::file(file.try_clone().unwrap().into(), 0, pages * PAGE).unwrap();
        mapping.region().span(0, pages * PAGE).unwrap().copy_from(&vec![7; (pages * PAGE) as usize]);
        (file, mapping)
    }

    fn byte(mapping: &Mapping, page: u64) -> u8 {
        let mut out = [9];
        mapping.region().span(page * PAGE + 5, 1).unwrap().copy_to(&mut out);
        out[0]
    }

    #[test]
    fn a_file_that_was_made_shorter_is_found_by_its_length() {
        let (file, mapping) = file(4);
        assert_eq!(mapping.region().loss(), None);
        file.set_len(PAGE + 1).unwrap();
        let loss = mapping.region().loss();
        assert_eq!(loss, Some(Loss::Shortened { left: PAGE + 1, of: 4 * PAGE }));
        assert_eq!(Mapping::anonymous(PAGE).unwrap().region().loss(), None);
    }

    #[test]
    fn a_lost_page_reads_as_zero_is_told_and_its_neighbours_stay() {
        survive_lost_memory().unwrap();
        let ((short, lost), (_, other)) = (file(4), file(4));
        short.set_len(2 * PAGE).unwrap();
        assert_eq!([0, 1, 2].map(|page| byte(&lost, page)), [7, 7, 0]);
        lost.region().span(3 * PAGE, 1).unwrap().copy_from(b"x");
        assert_eq!(lost.region().loss(), Some(Loss::NoPage { at: 2 * PAGE + 5 }));
        assert_eq!((byte(&other, 2), other.region().loss()), (7, None));
        // The next region at this address starts without a loss.
        let address = lost.region().address();
        drop(lost);
        assert!(Entry::of(address).is_none_or(|entry| entry.lost.load(Ordering::Relaxed) == 0));
    }

    /// Memory of 2 MiB pages without a reservation, as an embedder may map it.
    #[cfg(feature = "vm-memory")]
    fn unreserved(pages: usize) -> HostRegion {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let map = vm_memory::mmap::MmapRegionBuilder::<()>::new(pages * HUGE as usize)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB)
            .build()
            .unwrap();
        let region = vm_memory::GuestRegionMmap::new(map, vm_memory::GuestAddress(0)).unwrap();
        HostRegion::of_vm_memory(&region).unwrap()
    }

    #[cfg(feature = "vm-memory")]
    const HUGE: u64 = 2 << 20;

    #[test]
    #[cfg(feature = "vm-memory")]
    fn a_pool_of_huge_pages_that_runs_dry_is_told_and_ends_no_process() {
        let pool = |name: &str| {
            let path = std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").join(name);
            std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<usize>().ok())
        };
        let [Some(free), Some(more)] = ["free_hugepages", "nr_overcommit_hugepages"].map(pool) else {
            return;
        };
        // Pages that other tests have reserved remain theirs.
        survive_lost_memory().unwrap();
        let region = unreserved(free + more + 1);
        let mut lost = None;
        for page in 0..(free + more + 1) as u64 {
            region.span(page * HUGE + 5, 1).unwrap().copy_from(b"x");
            lost = region.loss();
            if lost.is_some() {
                assert_eq!(lost, Some(Loss::NoPage { at: page * HUGE + 5 }));
                break;
            }
        }
        assert!(lost.is_some(), "{free} free pages and {more} more were enough for one page too many");
        // Other mappings of the same pool are not affected, and memory of small pages is available.
        let (_, other) = file(4);
        assert_eq!((byte(&other, 2), other.region().loss()), (7, None));
    }

    /// Runs alone in its process, which the signal ends.
    #[test]
    #[ignore = "started by the test below"]
    fn elsewhere() {
        survive_lost_memory().unwrap();
        let file = tempfile::tempfile().unwrap();
        file.set_len(PAGE).unwrap();
        // SAFETY: no reference to the mapping is made.
        let map = memmap2::MmapOptions::new().map_raw(&file).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: mapped; the kernel has no page for it, which is what the test tries.
        unsafe { map.as_ptr().read_volatile() };
    }

    #[test]
    fn memory_that_is_no_guests_ends_the_process_as_before() {
        let ended = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sys::lost_memory::tests::elsewhere", "--ignored"])
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGBUS));
    }
}
