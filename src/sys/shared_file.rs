//! The backing file of shared memory, as another process may map it: a memfd, a file on tmpfs, hugetlbfs or a disk.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fcntl_getfl, fstat};

use super::untouched::Backing;
use super::{HostRegion, Mapping, MappingError};

/// Why a descriptor is not the memory that it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SharedFileError {
    /// It is no file.
    #[error("the descriptor is a {kind}, not a file that can be mapped")]
    NoFile {
        /// Its kind.
        kind: &'static str,
    },
    /// It can't be written to.
    #[error("the descriptor is open for reading only; open the memory's file for reading and writing")]
    ReadOnly,
    /// The file ends before the memory does.
    #[error("the memory has {len} bytes from {start:#x} on, and its file only {file_len} bytes")]
    Short {
        /// Offset of the memory in the file.
        start: u64,
        /// Bytes of memory.
        len: u64,
        /// Bytes the file has.
        file_len: u64,
    },
    /// The kernel gives no information about it.
    #[error("the kernel reports nothing about the descriptor")]
    Kernel(#[from] io::Error),
}

/// A file that memory is a shared mapping of, and where the memory starts in it. Clones are of the same descriptor.
#[derive(Clone, Debug)]
pub struct SharedFile {
    fd: Arc<OwnedFd>,
    start: u64,
}

impl SharedFile {
    /// Takes a descriptor that is, according to another process, `len` bytes of memory from `start` on.
    ///
    /// # Errors
    /// [`SharedFileError`]: it is no regular file, can't be written to, or is shorter than that.
    pub fn checked(fd: OwnedFd, start: u64, len: u64) -> Result<Self, SharedFileError> {
        let file = Self { fd: Arc::new(fd), start };
        file.check(len)?;
        Ok(file)
    }

    /// Checks again that the file holds `len` bytes of memory: one that is not [sealed](Self::is_sealed) may have become
    /// shorter.
    ///
    /// # Errors
    /// As [`checked`](Self::checked).
    pub fn check(&self, len: u64) -> Result<(), SharedFileError> {
        let stat = fstat(&*self.fd).map_err(io::Error::from)?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => None,
            FileType::Directory => Some("directory"),
            FileType::Socket => Some("socket"),
            FileType::Fifo => Some("pipe"),
            FileType::CharacterDevice | FileType::BlockDevice => Some("device"),
            _ => Some("descriptor of another kind"),
        };
        if let Some(kind) = kind {
            return Err(SharedFileError::NoFile { kind });
        }
        let flags = fcntl_getfl(&*self.fd).map_err(io::Error::from)?;
        if flags & OFlags::RWMODE != OFlags::RDWR {
            return Err(SharedFileError::ReadOnly);
        }
        let (start, file_len) = (self.start, u64::try_from(stat.st_size).unwrap_or(0));
        match start.checked_add(len) {
            Some(end) if end <= file_len => Ok(()),
            _ => Err(SharedFileError::Short { start, len, file_len }),
        }
    }

    /// Prevents the file from being made shorter (F_SEAL_SHRINK, fcntl(2)), if the file can be sealed: a memfd made
    /// with MFD_ALLOW_SEALING. True if it is so now.
    pub fn seal(&self) -> bool {
        self.is_sealed() || fcntl_add_seals(&*self.fd, SealFlags::SHRINK).is_ok()
    }

    /// True if the file can't be made shorter.
    pub fn is_sealed(&self) -> bool {
        fcntl_get_seals(&*self.fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK))
    }

    /// The descriptor.
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Offset of the memory in the file, in bytes.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Maps `len` bytes of the memory into this process.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn map(&self, len: u64) -> Result<Mapping, MappingError> {
        let fd = self.fd.try_clone().map_err(|source| MappingError::Kernel {
            what: "duplicating the descriptor of",
            len,
            remedy: "raise the limit of open files (RLIMIT_NOFILE)",
            source,
        })?;
        Mapping::file(fd, self.start, len)
    }

    /// True if both are the same bytes of the same file.
    pub fn is_same(&self, other: &Self) -> bool {
        let identity = |file: &Self| fstat(&*file.fd).map(|stat| (stat.st_dev, stat.st_ino)).ok();
        let ours = identity(self);
        ours.is_some() && ours == identity(other) && self.start == other.start
    }
}

impl HostRegion {
    /// The backing file, if the memory is a shared mapping of one and its owner has declared it
    /// ([`from_raw_file`](Self::from_raw_file)): a process that maps it has the same memory.
    pub fn shared_file(&self) -> Option<SharedFile> {
        match self.backing() {
            Backing::File(fd, start) => Some(SharedFile { fd: Arc::clone(fd), start: *start }),
            Backing::Unknown | Backing::Anonymous => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use rustix::fs::ftruncate;

    use super::*;

    const LEN: u64 = 64 << 10;

    #[test]
    fn memory_of_a_memfd_is_mapped_again_by_its_file_and_is_sealed() {
        let memory = Mapping::memfd("ram", LEN).unwrap();
        let file = memory.region().shared_file().unwrap();
        assert!(!file.is_sealed() && file.seal() && file.is_sealed());
        assert!(ftruncate(file.descriptor(), LEN / 2).is_err(), "nobody makes it shorter");
        let again = file.map(LEN).unwrap();
        memory.region().span(9, 3).unwrap().copy_from(b"abc");
        let mut out = [0; 3];
        again.region().span(9, 3).unwrap().copy_to(&mut out);
        assert_eq!(&out, b"abc");
        assert!(again.region().shared_file().unwrap().is_same(&file));
        let other = Mapping::memfd("ram", LEN).unwrap().region().shared_file().unwrap();
        assert!(!other.is_same(&file));
        assert!(Mapping::anonymous(LEN).unwrap().region().shared_file().is_none());
    }

    #[test]
    fn what_is_not_the_memory_that_it_is_said_to_be_is_refused() {
        let memfd = || Mapping::memfd("ram", LEN).unwrap().region().shared_file().unwrap();
        let descriptor = |file: SharedFile| file.fd.try_clone().unwrap();
        let refused = |fd, start, len| SharedFile::checked(fd, start, len).unwrap_err();
        assert!(SharedFile::checked(descriptor(memfd()), 4096, LEN - 4096).is_ok());
        for (start, len) in [(0, LEN + 1), (4096, LEN), (u64::MAX, 2)] {
            assert!(matches!(refused(descriptor(memfd()), start, len), SharedFileError::Short { .. }));
        }
        let (reader, _writer) = std::io::pipe().unwrap();
        let (socket, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        let others = [
            (reader.into(), "pipe"),
            (socket.into(), "socket"),
            (std::fs::File::open("/dev/null").unwrap().into(), "device"),
            (std::fs::File::open("/").unwrap().into(), "directory"),
        ];
        for (fd, kind) in others {
            assert!(refused(fd, 0, 1).to_string().contains(kind), "{kind}");
        }
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(LEN).unwrap();
        let reading = std::fs::File::open(path.path()).unwrap();
        assert!(matches!(refused(reading.into(), 0, LEN), SharedFileError::ReadOnly));
    }

    /// A file that is not sealed is checked again before it is relied on.
    #[test]
    fn a_file_that_has_become_shorter_is_found() {
        let path = tempfile::NamedTempFile::new().unwrap();
        path.as_file().set_len(LEN).unwrap();
        let fd = path.as_file().try_clone().unwrap();
        let file = SharedFile::checked(fd.into(), 0, LEN).unwrap();
        assert!(file.check(LEN).is_ok());
        path.as_file().set_len(LEN - 4096).unwrap();
        assert!(
            matches!(file.check(LEN), Err(SharedFileError::Short { file_len, .. }) if file_len == LEN - 4096)
        );
    }
}
