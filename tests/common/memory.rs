//! Guest memory in files: filled with a pattern before, compared afterwards.

use std::{
    fs::File,
    io::{BufReader, BufWriter, Read, Write},
    ops::Range,
    path::Path,
};

pub(crate) const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// The initial content of a file of guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Pattern {
    /// A hole: every page zero.
    Zero,
    /// Every page random.
    Random { seed: u64 },
    /// As in a guest: of 8 pages 3 are zero, 1 has one repeated byte, 1 is zero except for its last byte, 3 are random.
    Mixed { seed: u64 },
}

/// SplitMix64: small, seeded, and sufficient to make all pages different.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, page: &mut [u8]) {
        for word in page.chunks_exact_mut(8) {
            word.copy_from_slice(&self.draw().to_le_bytes());
        }
    }
}

/// Makes `path` a file of `mib` MiB of guest memory.
pub(crate) fn fill(path: &Path, mib: usize, pattern: Pattern) {
    let file = File::create(path).expect("cannot create guest memory");
    file.set_len((mib * MIB) as u64).expect("cannot size guest memory");
    let (seed, mixed) = match pattern {
        Pattern::Zero => return,
        Pattern::Random { seed } => (seed, false),
        Pattern::Mixed { seed } => (seed, true),
    };
    let mut random = Random(seed);
    let mut out = BufWriter::with_capacity(MIB, file);
    for _ in 0..mib * MIB / PAGE {
        let mut page = [0_u8; PAGE];
        match if mixed { random.draw() % 8 } else { 7 } {
            0..3 => {}
            3 => page.fill((random.draw() % 255) as u8 + 1),
            4 => page[PAGE - 1] = 1,
            _ => random.fill(&mut page),
        }
        out.write_all(&page).expect("cannot write guest memory");
    }
    out.flush().expect("cannot write guest memory");
}

/// Differences between two files of guest memory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    /// Lengths in bytes.
    pub(crate) lengths: (u64, u64),
    /// Runs of 4 KiB pages that differ, at most the first 16.
    pub(crate) page_runs: Vec<Range<usize>>,
    /// Number of pages that differ.
    pub(crate) pages: usize,
}

/// Compares two files page by page; `Ok` contains the number of pages that are not zero in both.
pub(crate) fn compare(left: &Path, right: &Path) -> Result<usize, Difference> {
    let open = |path: &Path| File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let files = (open(left), open(right));
    let length = |file: &File| file.metadata().expect("no metadata").len();
    let mut found = Difference { lengths: (length(&files.0), length(&files.1)), page_runs: vec![], pages: 0 };
    let mut readers = (BufReader::with_capacity(MIB, files.0), BufReader::with_capacity(MIB, files.1));
    let mut pages = ([0_u8; PAGE], [0_u8; PAGE]);
    let mut filled = 0;
    for index in 0..(found.lengths.0.min(found.lengths.1) as usize) / PAGE {
        readers.0.read_exact(&mut pages.0).expect("cannot read guest memory");
        readers.1.read_exact(&mut pages.1).expect("cannot read guest memory");
        if pages.0 != pages.1 {
            found.pages += 1;
            let runs = found.page_runs.len();
            match found.page_runs.last_mut() {
                Some(run) if run.end == index => run.end += 1,
                _ if runs < 16 => found.page_runs.push(index..index + 1),
                _ => {}
            }
        } else if pages.0 != [0; PAGE] {
            filled += 1;
        }
    }
    if found.pages == 0 && found.lengths.0 == found.lengths.1 { Ok(filled) } else { Err(found) }
}

/// KiB of private memory in huge pages of the process (`AnonHugePages` of /proc/PID/smaps_rollup).
pub(crate) fn anonymous_huge_kib(pid: u32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

/// How often the kernel found no huge page of 2 MiB to allocate.
pub(crate) fn huge_pages_not_found() -> u64 {
    let text = std::fs::read_to_string("/proc/vmstat").unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix("thp_fault_fallback "));
    line.map_or(0, |count| count.parse().unwrap())
}

/// False, with a message, if the kernel never uses huge pages for private memory.
pub(crate) fn has_huge_pages() -> bool {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let has = enabled.is_ok_and(|enabled| !enabled.contains("[never]"));
    if !has {
        super::skip("huge pages: madvise in /sys/kernel/mm/transparent_hugepage/enabled");
    }
    has
}
