//! The file itself: opened, locked, and named in errors.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{
    AtFlags, FallocateFlags, FlockOperation, SeekFrom, StatxFlags, fallocate, flock, seek, statx,
};
use rustix::io::Errno;

use crate::sys::{HostSpan, Mapping, MappingError, SendPart, read_at, write_at};
use crate::transport::{ChannelError, OpenError};

/// A file of places, and where its stream begins.
#[derive(Debug)]
pub(super) struct MappedFile {
    file: File,
    /// For pages, past the page cache.
    direct: Option<Direct>,
    path: PathBuf,
    pub(super) starts_at: u64,
    /// What is done to the file fails from this step on.
    #[cfg(test)]
    pub(super) breaks_at: std::sync::atomic::AtomicI64,
}

/// The file, opened with O_DIRECT.
#[derive(Debug)]
struct Direct {
    file: File,
    /// Addresses, offsets and lengths are multiples of it, as the file system asks.
    align: usize,
    /// It has refused pages that fit: the rest goes through the page cache.
    refused: AtomicBool,
}

impl Direct {
    /// `None` where the file system has none, or does not tell what it asks (STATX_DIOALIGN, Linux 6.1).
    fn of(file: &File) -> Option<Self> {
        let told = statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let known = StatxFlags::from_bits_retain(told.stx_mask).contains(StatxFlags::DIOALIGN);
        let aligns = [told.stx_dio_mem_align, told.stx_dio_offset_align];
        if !known || aligns.contains(&0) {
            return None;
        }
        let align = aligns.into_iter().max().and_then(|align| usize::try_from(align).ok())?;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let file = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(path).ok()?;
        Some(Self { file, align, refused: AtomicBool::new(false) })
    }

    /// `None` if the bytes can't go this way: they go through the page cache.
    fn write(&self, span: HostSpan<'_>, skip: usize, at: u64) -> Option<io::Result<usize>> {
        let offset = usize::try_from(at).ok()?;
        let fits =
            [span.address() + skip, span.len() - skip, offset].iter().all(|n| n.is_multiple_of(self.align));
        if !fits || self.refused.load(Ordering::Relaxed) {
            return None;
        }
        match write_at(self.file.as_fd(), &[SendPart::Guest(span)], skip, at) {
            // Memory that can't be pinned, or a file system that thinks again.
            Err(error)
                if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EFAULT | libc::EOPNOTSUPP)) =>
            {
                tracing::debug!(%error, "pages are written through the page cache");
                self.refused.store(true, Ordering::Relaxed);
                None
            }
            written => Some(written),
        }
    }
}

impl MappedFile {
    /// Opens a file that is there, to be read. Nobody of our kind writes to it meanwhile.
    pub(super) fn to_read(path: &Path, starts_at: u64) -> io::Result<Self> {
        Self::locked(path, starts_at, OpenOptions::new().read(true), FlockOperation::NonBlockingLockShared)
    }

    /// Opens or makes a file to write to. What it held behind `starts_at` is gone, for good: what stands there from now on
    /// is of this guest.
    pub(super) fn to_write(path: &Path, starts_at: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        // It holds a guest's memory: a new one is its owner's alone.
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut this = Self::locked(path, starts_at, &options, FlockOperation::NonBlockingLockExclusive)?;
        this.direct = Direct::of(&this.file);
        this.cut(starts_at)?;
        // On the disk, too: an old first word must not stand in front of new pages after a crash.
        this.sync()?;
        Ok(this)
    }

    fn locked(path: &Path, starts_at: u64, options: &OpenOptions, how: FlockOperation) -> io::Result<Self> {
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no plain file: only there have pages places"));
        }
        match flock(&file, how) {
            // Some file systems have no locks.
            Ok(()) | Err(Errno::NOTSUP | Errno::NOLCK | Errno::NOSYS) => {}
            Err(Errno::WOULDBLOCK) => {
                let why = "another process reads it or writes to it; wait for it to end";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, why));
            }
            Err(errno) => return Err(errno.into()),
        }
        Ok(Self {
            file,
            direct: None,
            path: path.to_owned(),
            starts_at,
            #[cfg(test)]
            breaks_at: std::sync::atomic::AtomicI64::new(i64::MAX),
        })
    }

    /// Whether pages go past the page cache; `None` where the file system has no such way.
    #[cfg(test)]
    pub(super) fn is_direct(&self) -> Option<bool> {
        self.direct.as_ref().map(|direct| !direct.refused.load(Ordering::Relaxed))
    }

    /// In front of everything that is done to the file.
    fn step(&self) -> io::Result<()> {
        #[cfg(test)]
        if self.breaks_at.fetch_sub(1, std::sync::atomic::Ordering::Relaxed) <= 0 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        Ok(())
    }

    /// Bytes of the file.
    pub(super) fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// Fills `into` from `at` on, as far as there are bytes.
    pub(super) fn read(&self, into: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read_at(into, at)
    }

    /// Fills all of `into`.
    pub(super) fn read_all(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    /// Fills guest memory from `at` on; how many bytes, 0 at the end of the file.
    pub(super) fn read_pages(&self, span: HostSpan<'_>, at: u64) -> io::Result<usize> {
        read_at(self.file.as_fd(), span, at)
    }

    /// A copy of a part of it in memory, which takes room only where it is written.
    pub(super) fn map(&self, at: u64, len: u64) -> Result<Mapping, MappingError> {
        Mapping::file_copy(self.file.as_fd(), at, len)
    }

    /// False if there is nothing but holes from `at` on for `len` bytes.
    pub(super) fn may_hold(&self, at: u64, len: u64) -> bool {
        match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data < at.saturating_add(len),
            Err(errno) => errno != Errno::NXIO,
        }
    }

    pub(super) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.step()?;
        self.file.write_all_at(bytes, at)
    }

    /// Writes guest memory but the first `skip` bytes of it, past the page cache where that can be; how many bytes went.
    pub(super) fn write_pages(&self, span: HostSpan<'_>, skip: usize, at: u64) -> io::Result<usize> {
        self.step()?;
        if let Some(written) = self.direct.as_ref().and_then(|direct| direct.write(span, skip, at)) {
            return written;
        }
        write_at(self.file.as_fd(), &[SendPart::Guest(span)], skip, at)
    }

    /// Makes it as long.
    pub(super) fn cut(&self, len: u64) -> io::Result<()> {
        self.step()?;
        self.file.set_len(len)
    }

    /// All that was written is on the disk when this returns.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.file.sync_all()
    }

    /// The name for errors.
    pub(super) fn name(&self) -> String {
        name(&self.path)
    }

    /// The kernel's answer, as an error of this file.
    pub(super) fn failed(&self, doing: &'static str, source: io::Error) -> ChannelError {
        ChannelError::Io { peer: self.name(), doing, source }
    }

    /// As [`failed`](Self::failed), with the place.
    pub(super) fn failed_at(&self, doing: &'static str, at: u64, source: &io::Error) -> ChannelError {
        self.failed(doing, io::Error::new(source.kind(), format!("at offset {at:#x}: {source}")))
    }

    /// Gives the room of `len` bytes from `at` on back: they read as zero. Where the file system can't, they stay.
    pub(super) fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.step()?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        unless_unsupported(fallocate(&self.file, flags, at, len))
    }

    /// Takes room for `len` bytes from `at` on without making the file longer, where the file system can.
    pub(super) fn reserve(&self, at: u64, len: u64) -> io::Result<()> {
        self.step()?;
        unless_unsupported(fallocate(&self.file, FallocateFlags::KEEP_SIZE, at, len))
    }

    /// The file's name is on the disk, too.
    pub(super) fn sync_folder(&self) -> io::Result<()> {
        let folder = self.path.parent().filter(|path| !path.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

fn unless_unsupported(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::NOTSUP | Errno::NOSYS) => Ok(()),
        result => Ok(result?),
    }
}

fn name(path: &Path) -> String {
    format!("mapped:{}", path.display())
}

/// Why it could not be opened.
pub(super) fn not_opened(path: &Path) -> impl Fn(io::Error) -> OpenError {
    let address = name(path);
    move |source| OpenError::Open {
        address: address.clone(),
        doing: "opening",
        remedy: "give a plain file that this process may use and no other one does",
        source,
    }
}
