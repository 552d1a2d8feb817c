//! Time from the touch of a missing page to its contents: `ServedMemory` compared with a loop that only reads the
//! fault, reads the page (pread) and places it (UFFDIO_COPY). Pairs of runs over the same file in the page cache, one
//! thread that touches pages in an order without neighbours, no reader of the rest.
//!
//!     cargo bench --features testing --bench fault_latency
#![allow(unsafe_code, missing_docs, clippy::unwrap_used)]

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ramwire::session::{HandedRegion, ServeSettings, ServedMemory};
use ramwire::sys::{Mapping, duplicate};
use ramwire::transport::StoredMemory;
use userfaultfd::{Event, FeatureFlags, Uffd, UffdBuilder};

const PAGES: u64 = 20_011;
const PAIRS: usize = 10;

fn made() -> (Mapping, Uffd) {
    let mapping = Mapping::anonymous(PAGES * 4096).unwrap();
    let mut builder = UffdBuilder::new();
    builder.close_on_exec(true).non_blocking(true).user_mode_only(true);
    let uffd = builder.require_features(FeatureFlags::EVENT_REMOVE).create().unwrap();
    uffd.register(mapping.region().address() as *mut _, (PAGES * 4096) as usize).unwrap();
    (mapping, uffd)
}

/// Touches every page once; returns how long each took, ascending.
fn touched(mapping: &Mapping) -> Vec<Duration> {
    let mut took: Vec<Duration> = (0..PAGES)
        .map(|step| {
            let page = step * 7919 % PAGES;
            let mut bytes = [0; 8];
            let began = Instant::now();
            mapping.region().span(page * 4096, 8).unwrap().copy_to(&mut bytes);
            let took = began.elapsed();
            assert_eq!(u64::from_le_bytes(bytes), page + 1);
            took
        })
        .collect();
    took.sort_unstable();
    took
}

fn bare(file: &File) -> Vec<Duration> {
    let (mapping, uffd) = made();
    let start = mapping.region().address();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = [0; 4096];
            for _ in 0..PAGES {
                let address = loop {
                    let mut fds = [rustix::event::PollFd::new(&uffd, rustix::event::PollFlags::IN)];
                    rustix::event::poll(&mut fds, None).unwrap();
                    match uffd.read_event().unwrap() {
                        Some(Event::Pagefault { addr, .. }) => break addr as usize & !4095,
                        _ => continue,
                    }
                };
                file.read_exact_at(&mut buffer, (address - start) as u64).unwrap();
                // SAFETY: the page is missing, and the buffer has its length.
                unsafe { uffd.copy(buffer.as_ptr().cast(), address as *mut _, 4096, true) }.unwrap();
            }
        });
        touched(&mapping)
    })
}

fn served(stored: &Arc<StoredMemory>) -> Vec<Duration> {
    let (mapping, uffd) = made();
    let fd: OwnedFd = duplicate(&uffd.as_raw_fd()).unwrap();
    let address = mapping.region().address() as u64;
    let region = HandedRegion { address, len: PAGES * 4096, page: 4096, offset: 0 };
    let mut settings = ServeSettings::default();
    settings.readers = 0;
    let _served = ServedMemory::serve(fd, &[region], stored, &settings).unwrap();
    touched(&mapping)
}

fn main() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for page in 0..PAGES {
        let mut bytes = [7; 4096];
        bytes[..8].copy_from_slice(&(page + 1).to_le_bytes());
        file.write_all(&bytes).unwrap();
    }
    let stored = Arc::new(StoredMemory::plain(file.path()).unwrap());
    let micros =
        |took: &[Duration], part: f64| took[(took.len() as f64 * part) as usize].as_nanos() as f64 / 1e3;
    println!("us from touch to contents: bare p50 p99, served p50 p99, ratio of p50");
    let mut ratios: Vec<f64> = (0..PAIRS)
        .map(|pair| {
            // Each is first in every second pair.
            let (bare, served) = match pair % 2 {
                0 => (bare(file.as_file()), served(&stored)),
                _ => {
                    let served = served(&stored);
                    (bare(file.as_file()), served)
                }
            };
            let ratio = micros(&served, 0.5) / micros(&bare, 0.5);
            println!(
                "{:8.2} {:8.2} {:8.2} {:8.2} {ratio:6.3}",
                micros(&bare, 0.5),
                micros(&bare, 0.99),
                micros(&served, 0.5),
                micros(&served, 0.99)
            );
            ratio
        })
        .collect();
    ratios.sort_unstable_by(f64::total_cmp);
    println!("median ratio {:.3}, from {:.3} to {:.3}", ratios[PAIRS / 2], ratios[0], ratios[PAIRS - 1]);
}
