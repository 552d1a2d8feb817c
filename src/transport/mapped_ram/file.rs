//! The mapped-ram file: opened and locked, and named in errors.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, fallocate, flock, seek};
use rustix::io::Errno;

use super::direct::Direct;
#[cfg(test)]
use super::journal::Op;
use super::start::find_stream;
use crate::sys::{HostSpan, Mapping, MappingError, SendPart, read_at, write_at};
use crate::transport::{ChannelError, OpenError};

/// A mapped-ram file, and the offset at which its stream begins.
#[derive(Debug)]
pub(super) struct MappedFile {
    file: File,
    /// Direct I/O for pages, bypassing the page cache.
    direct: Option<Direct>,
    path: PathBuf,
    pub(super) starts_at: u64,
    /// Operations on the file fail from this step on.
    #[cfg(test)]
    pub(super) breaks_at: std::sync::atomic::AtomicI64,
    #[cfg(test)]
    pub(super) journal: super::journal::Journal,
}

impl MappedFile {
    /// Opens an existing file for reading. No process of this program writes to it meanwhile. A stream at its start that is
    /// not there is looked for behind what stands in front of it.
    pub(super) fn to_read(path: &Path, starts_at: u64) -> io::Result<Self> {
        let how = FlockOperation::NonBlockingLockShared;
        let mut this = Self::locked(path, starts_at, OpenOptions::new().read(true), how)?;
        this.direct = Direct::to_read(&this.file);
        if starts_at == 0
            && let Some(found) = find_stream(&this.file)?
        {
            this.starts_at = found;
        }
        Ok(this)
    }

    /// Opens or creates a file for writing. Its old content is as it was until [`empty`](Self::empty).
    pub(super) fn to_write(path: &Path, starts_at: u64) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        // The file holds a guest's memory: only its owner may access a new one.
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let mut this = Self::locked(path, starts_at, &options, FlockOperation::NonBlockingLockExclusive)?;
        this.direct = Direct::to_write(&this.file);
        Ok(this)
    }

    /// Deletes its old content after `starts_at` permanently: everything written there from now on belongs to this guest.
    pub(super) fn empty(&self) -> io::Result<()> {
        self.cut(self.starts_at)?;
        // Also on the disk: an old first word must not precede new pages after a crash.
        self.sync()
    }

    fn locked(path: &Path, starts_at: u64, options: &OpenOptions, how: FlockOperation) -> io::Result<Self> {
        let file = options.open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file, which mapped: needs"));
        }
        match flock(&file, how) {
            // Some file systems do not support locks.
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
            #[cfg(test)]
            journal: super::journal::Journal::new(),
        })
    }

    /// Whether pages are written by direct I/O; `None` if the file system does not support it.
    #[cfg(test)]
    pub(super) fn is_direct(&self) -> Option<bool> {
        self.direct.as_ref().map(Direct::is_used)
    }

    /// Called before every operation on the file.
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

    /// Fills `into` from `at` on, as far as the file has bytes.
    pub(super) fn read(&self, into: &mut [u8], at: u64) -> io::Result<usize> {
        self.file.read_at(into, at)
    }

    /// Fills all of `into`.
    pub(super) fn read_all(&self, into: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(into, at)
    }

    /// Fills guest memory from `at` on; returns the number of bytes, 0 at the end of the file.
    pub(super) fn read_pages(&self, span: HostSpan<'_>, at: u64) -> io::Result<usize> {
        read_at(self.file.as_fd(), span, at)
    }

    /// The file past the page cache, if the file system has direct I/O.
    pub(super) fn direct(&self) -> Option<&Direct> {
        self.direct.as_ref()
    }

    /// Fills all of the guest memory from `at` on.
    pub(super) fn fill(&self, span: HostSpan<'_>, at: u64) -> io::Result<()> {
        let mut done = 0;
        while done < span.len() {
            let Some(rest) = span.part(done, span.len() - done) else { break };
            match self.read_pages(rest, at + done as u64) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(got) => done += got,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A copy of a part of it in memory, which takes room only where it is written.
    pub(super) fn map(&self, at: u64, len: u64) -> Result<Mapping, MappingError> {
        Mapping::file_copy(self.file.as_fd(), at, len)
    }

    /// False if there are only holes in the `len` bytes from `at` on.
    pub(super) fn may_hold(&self, at: u64, len: u64) -> bool {
        match seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data < at.saturating_add(len),
            Err(errno) => errno != Errno::NXIO,
        }
    }

    pub(super) fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.step()?;
        #[cfg(test)]
        self.journal.add(|| Op::Write { at, bytes: bytes.to_vec() });
        self.file.write_all_at(bytes, at)
    }

    /// Writes guest memory without its first `skip` bytes, by direct I/O if possible; returns the number of bytes.
    pub(super) fn write_pages(&self, span: HostSpan<'_>, skip: usize, at: u64) -> io::Result<usize> {
        self.step()?;
        #[cfg(test)]
        self.journal.add(|| {
            let mut bytes = vec![0; span.len()];
            span.copy_to(&mut bytes);
            Op::Write { at, bytes: bytes.split_off(skip) }
        });
        if let Some(written) = self.direct.as_ref().and_then(|direct| direct.write(span, skip, at)) {
            return written;
        }
        write_at(self.file.as_fd(), &[SendPart::Guest(span)], skip, at)
    }

    /// Makes it as long.
    pub(super) fn cut(&self, len: u64) -> io::Result<()> {
        self.step()?;
        #[cfg(test)]
        self.journal.add(|| Op::Cut { len });
        self.file.set_len(len)
    }

    /// Returns after all written bytes are on the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.step()?;
        self.file.sync_all()?;
        #[cfg(test)]
        self.journal.add(|| Op::Synced);
        Ok(())
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Where it lies.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The name for errors.
    pub(super) fn name(&self) -> String {
        name(&self.path)
    }

    /// The kernel's error, as an error of this file.
    pub(super) fn failed(&self, doing: &'static str, source: io::Error) -> ChannelError {
        ChannelError::Io { peer: self.name(), doing, source }
    }

    /// As [`failed`](Self::failed), with the place.
    pub(super) fn failed_at(&self, doing: &'static str, at: u64, source: &io::Error) -> ChannelError {
        self.failed(doing, io::Error::new(source.kind(), format!("at offset {at:#x}: {source}")))
    }

    /// Frees the space of `len` bytes from `at` on: they then read as zero. If the file system can't, they stay.
    pub(super) fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.step()?;
        #[cfg(test)]
        self.journal.add(|| Op::Punch { at, len });
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        unless_unsupported(fallocate(&self.file, flags, at, len))
    }

    /// Reserves space for `len` bytes from `at` on without changing the file's length, if the file system can.
    pub(super) fn reserve(&self, at: u64, len: u64) -> io::Result<()> {
        self.step()?;
        unless_unsupported(fallocate(&self.file, FallocateFlags::KEEP_SIZE, at, len))
    }

    /// Makes sure that the file's name is on the disk, too.
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

/// Why the file could not be opened.
pub(super) fn not_opened(path: &Path) -> impl Fn(io::Error) -> OpenError {
    let address = name(path);
    move |source| OpenError::Open {
        address: address.clone(),
        doing: "opening",
        remedy: "give a plain file that this process may use and no other one does",
        source,
    }
}
