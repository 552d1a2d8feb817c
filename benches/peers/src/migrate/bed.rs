//! The memory that every contestant migrates: one file to read from, one to write to.

use std::cell::Cell;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Instant;

use ramwire::sys::{HostSpan, Mapping, populate};

use super::Populated;
use crate::BenchError;

const MIB: usize = 1 << 20;

/// What the source's memory holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    /// Pages of random bytes.
    Random,
    /// This many percent of the pages are random, the others zero.
    Mixed(u8),
    /// Zero pages that are backed by host memory.
    Zero,
}

impl FromStr for Fill {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = |text: &str| text.parse().ok().filter(|percent| *percent <= 100);
        match (text, text.strip_prefix("mixed:").map(percent)) {
            ("random", _) => Ok(Self::Random),
            ("zero", _) => Ok(Self::Zero),
            (_, Some(Some(percent))) => Ok(Self::Mixed(percent)),
            _ => Err("write random, zero or mixed:PERCENT, the share of pages that are random".into()),
        }
    }
}

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Random => f.write_str("random"),
            Self::Zero => f.write_str("zero"),
            Self::Mixed(percent) => write!(f, "mixed:{percent}"),
        }
    }
}

impl Fill {
    /// The percentage of pages that are not zero.
    fn percent(self) -> u64 {
        match self {
            Self::Random => 100,
            Self::Mixed(percent) => percent.into(),
            Self::Zero => 0,
        }
    }
}

/// The kind of the destination's memory; a source's is a file in memory that both map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Memory {
    /// A file in memory, mapped shared
    Shared,
    /// Private memory for which huge pages are asked, as a QEMU does for its `-m`
    Huge,
}

/// Two files of the same length in memory, removed with this value.
#[derive(Debug)]
pub struct Bed {
    folder: PathBuf,
    bytes: u64,
    populated: Populated,
    memory: Memory,
    /// Folder of certificates, if the migrations are encrypted.
    tls: Option<PathBuf>,
    /// Data that arrives in private memory must be copied to the file, too.
    kept: Cell<bool>,
}

impl Bed {
    /// Makes the files in a new folder under `base` and fills both.
    ///
    /// # Errors
    /// [`BenchError::Memory`], with too little room in `base` as the likely cause.
    pub fn make(
        base: &Path,
        bytes: u64,
        fill: Fill,
        populated: Populated,
        memory: Memory,
    ) -> Result<Self, BenchError> {
        let folder = base.join(format!("ramwire-bench-{}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|source| failed(&folder, source))?;
        let bed = Self { folder, bytes, populated, memory, tls: None, kept: Cell::new(false) };
        write_filled(&bed.source(), bytes, fill).map_err(|source| failed(&bed.source(), source))?;
        bed.clear_destination()?;
        Ok(bed)
    }

    /// The same for migrations over TLS, with the certificates of `folder`.
    pub fn encrypted(mut self, folder: Option<PathBuf>) -> Self {
        self.tls = folder;
        self
    }

    /// Folder of certificates, if the migrations are encrypted.
    pub fn tls(&self) -> Option<&Path> {
        self.tls.as_deref()
    }

    /// File to read from.
    pub fn source(&self) -> PathBuf {
        self.folder.join("source")
    }

    /// File to write to.
    pub fn destination(&self) -> PathBuf {
        self.folder.join("destination")
    }

    /// A folder for sockets and logs.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Length of each file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The state of the memory before the clock starts.
    pub fn populated(&self) -> Populated {
        self.populated
    }

    /// What a destination's memory is.
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// True if a destination with private memory leaves a copy in the file.
    pub fn copies_back(&self) -> bool {
        self.memory == Memory::Huge && self.kept.get()
    }

    /// One run into zeroed memory; returns also the first byte at which the two files then differ.
    ///
    /// # Errors
    /// The run's, [`BenchError::Memory`].
    pub fn compared<T>(
        &self,
        run: impl FnOnce() -> Result<T, BenchError>,
    ) -> Result<(T, Option<u64>), BenchError> {
        self.clear_destination()?;
        self.kept.set(true);
        let run = run();
        self.kept.set(false);
        Ok((run?, self.difference()?))
    }

    /// Makes the destination all zero: present pages, or holes.
    ///
    /// # Errors
    /// [`BenchError::Memory`].
    pub fn clear_destination(&self) -> Result<(), BenchError> {
        let path = self.destination();
        let cleared = match self.populated {
            Populated::Yes | Populated::Backed if self.memory == Memory::Shared => {
                write_filled(&path, self.bytes, Fill::Zero)
            }
            _ => File::create(&path).and_then(|file| file.set_len(self.bytes)),
        };
        cleared.map_err(|source| failed(&path, source))
    }

    /// Before each run an unpopulated destination is populated and freed again, so that every contestant starts with
    /// enough free memory on the host. Returns the seconds that the populate took.
    ///
    /// # Errors
    /// [`BenchError::Memory`].
    pub fn renew(&self) -> Result<Option<f64>, BenchError> {
        if self.populated != Populated::No {
            return Ok(None);
        }
        self.clear_destination()?;
        let mapping = self.memory.map(&self.destination(), self.bytes, false)?;
        let begun = Instant::now();
        populate(whole(&mapping)?).map_err(|source| failed(&self.destination(), source))?;
        let seconds = begun.elapsed().as_secs_f64();
        drop(mapping);
        self.clear_destination()?;
        Ok(Some(seconds))
    }

    /// The first byte at which the two files differ.
    ///
    /// # Errors
    /// [`BenchError::Memory`].
    pub fn difference(&self) -> Result<Option<u64>, BenchError> {
        compare(&self.source(), &self.destination()).map_err(|source| failed(&self.destination(), source))
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn failed(path: &Path, source: io::Error) -> BenchError {
    BenchError::Memory { path: path.to_owned(), source }
}

/// Writes every page, so that the host backs it. Random pages differ from each other: their bytes come from a generator
/// that is never restarted.
fn write_filled(path: &Path, bytes: u64, fill: Fill) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
    file.set_len(bytes)?;
    let mut chunk = vec![0u8; MIB];
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut page_number = 0u64;
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(MIB).min(MIB);
        for page in chunk[..now].chunks_mut(4096) {
            // Spreads the random pages evenly: at each of them the sum of the percentages passes a whole number.
            let percent = fill.percent();
            let random = (page_number + 1) * percent / 100 > page_number * percent / 100;
            page_number += 1;
            if !random {
                page.fill(0);
                continue;
            }
            for word in page.chunks_mut(8) {
                // Xorshift64 (Marsaglia 2003): fast, and no page repeats another.
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
            }
        }
        file.write_all(&chunk[..now])?;
        left -= now as u64;
    }
    Ok(())
}

fn compare(one: &Path, other: &Path) -> io::Result<Option<u64>> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let (mut left, mut right) = (vec![0; MIB], vec![0; MIB]);
    let mut at = 0u64;
    loop {
        let got = one.read(&mut left)?;
        if got == 0 {
            return Ok((other.read(&mut right)? > 0).then_some(at));
        }
        match other.read_exact(&mut right[..got]) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(Some(at)),
            read => read?,
        }
        if left[..got] != right[..got] {
            let same = left[..got].iter().zip(&right).take_while(|(a, b)| a == b).count();
            return Ok(Some(at + same as u64));
        }
        at += got as u64;
    }
}

impl Memory {
    /// A destination's memory: the bed's file `path`, or as much private memory.
    ///
    /// # Errors
    /// [`BenchError::Memory`].
    pub fn map(self, path: &Path, bytes: u64, populated: bool) -> Result<Mapping, BenchError> {
        match self {
            Self::Shared => map(path, bytes, populated),
            Self::Huge => {
                let mapping = Mapping::private(bytes, true);
                let mapping = mapping.map_err(|error| failed(path, io::Error::other(error)))?;
                populated_if(mapping, populated, path)
            }
        }
    }
}

/// Copies the memory at `address` of process `pid` to the file `path`.
///
/// # Errors
/// [`BenchError::Memory`].
pub fn copy_back(pid: u32, address: u64, bytes: u64, path: &Path) -> Result<(), BenchError> {
    let copy = || {
        let mut memory = File::open(format!("/proc/{pid}/mem"))?;
        memory.seek(SeekFrom::Start(address))?;
        io::copy(&mut memory.take(bytes), &mut File::create(path)?)
    };
    copy().map(drop).map_err(|source| failed(path, source))
}

/// Maps a file of the bed; with `populated` every page is in the page tables before the clock starts.
///
/// # Errors
/// [`BenchError::Memory`].
pub fn map(path: &Path, bytes: u64, populated: bool) -> Result<Mapping, BenchError> {
    let file = OpenOptions::new().read(true).write(true).open(path).map_err(|source| failed(path, source))?;
    let mapping = Mapping::file(OwnedFd::from(file), 0, bytes)
        .map_err(|error| failed(path, io::Error::other(error.to_string())))?;
    populated_if(mapping, populated, path)
}

fn populated_if(mapping: Mapping, populated: bool, path: &Path) -> Result<Mapping, BenchError> {
    if populated {
        populate(whole(&mapping)?).map_err(|source| failed(path, source))?;
    }
    Ok(mapping)
}

/// All of a mapping.
///
/// # Errors
/// None in practice: the span is the mapping's own length.
pub fn whole(mapping: &Mapping) -> Result<HostSpan<'_>, BenchError> {
    let region = mapping.region();
    region.span(0, region.len()).map_err(|error| failed(Path::new("a mapping"), io::Error::other(error)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pages_with_bytes(path: &Path) -> usize {
        std::fs::read(path).unwrap().chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count()
    }

    #[test]
    fn the_fill_has_the_share_of_random_pages_it_says() {
        let base = tempfile::tempdir().unwrap();
        for (fill, expected) in [("random", 500), ("mixed:70", 350), ("mixed:1", 5), ("zero", 0)] {
            let path = base.path().join("ram");
            write_filled(&path, 500 * 4096, fill.parse().unwrap()).unwrap();
            assert_eq!(pages_with_bytes(&path), expected, "{fill}");
        }
        for wrong in ["mixed", "mixed:101", "mixed:", "ones"] {
            assert!(wrong.parse::<Fill>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_difference_is_found_where_it_is_and_the_folder_goes() {
        let base = tempfile::tempdir().unwrap();
        let bed = Bed::make(base.path(), 3 << 20, Fill::Random, Populated::No, Memory::Shared).unwrap();
        assert_eq!(bed.difference().unwrap(), Some(0));
        let mut bytes = std::fs::read(bed.source()).unwrap();
        std::fs::write(bed.destination(), &bytes).unwrap();
        assert_eq!(bed.difference().unwrap(), None);
        bytes[2_000_001] ^= 1;
        std::fs::write(bed.destination(), &bytes).unwrap();
        assert_eq!(bed.difference().unwrap(), Some(2_000_001));
        bed.renew().unwrap();
        assert_eq!(pages_with_bytes(&bed.destination()), 0);
        let folder = bed.folder().to_owned();
        drop(bed);
        assert!(!folder.exists());
    }
}
