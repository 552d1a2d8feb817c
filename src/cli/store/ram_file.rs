//! The file of one RAM block while its guest arrives.
//!
//! Its whole length is reserved at the beginning, so that a full disk is detected before the source has sent a page.
//! The space of zero pages is freed at the end.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use ramwire::session::PassedBlock;
use ramwire::sys::{Mapping, is_zero, memory_room, release_zeros};

use super::{Store, StoreError, failed, private};

/// `f_type` of tmpfs and ramfs (statfs(2)): their files are memory.
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// With more blocks than this their descriptors are not kept open: the usual limit of descriptors is 1024.
pub(super) const MAX_KEPT_OPEN: usize = 128;

/// A block's file and its memory.
pub(super) struct RamFile {
    pub(super) name: String,
    pub(super) mapping: Mapping,
    /// Device and inode.
    identity: (u64, u64),
    /// The memory is not the file's own and is written to the file at the end.
    is_copied: bool,
}

impl RamFile {
    /// A new file of `length` bytes, mapped; with `held` separate memory that is written to the file at the end.
    pub(super) fn make(store: &Store, name: String, length: u64, held: bool) -> Result<Self, StoreError> {
        let path = store.file(&name);
        // New, since a file of an earlier attempt may hold old pages, and memory must begin as zero.
        let file = private::create(&path)?;
        let meta = file.metadata().map_err(failed(&path, "looking at"))?;
        let mapping = match held {
            true => Mapping::memfd(&name, length),
            false => Mapping::file_grown(file.into(), 0, length, true),
        };
        let mapping = mapping.map_err(|error| failed(&path, "mapping")(io::Error::other(error)))?;
        Ok(Self { name, mapping, identity: (meta.dev(), meta.ino()), is_copied: held })
    }

    /// A new file for memory that is another process's as well: it is written out at the end.
    pub(super) fn passed(
        store: &Store,
        name: String,
        length: u64,
        passed: &PassedBlock,
    ) -> Result<Self, StoreError> {
        let path = store.file(&name);
        let file = private::create(&path)?;
        let meta = file.metadata().map_err(failed(&path, "looking at"))?;
        let mapping = passed.file().map(length);
        let mapping =
            mapping.map_err(|error| failed(&path, "mapping memory for")(io::Error::other(error)))?;
        Ok(Self { name, mapping, identity: (meta.dev(), meta.ino()), is_copied: true })
    }

    /// Closes the descriptor; the memory stays.
    pub(super) fn detached(self) -> Self {
        Self { mapping: self.mapping.detached(), ..self }
    }

    /// Returns after all of it is on the disk, in the file of that name.
    pub(super) fn put(&self, store: &Store) -> Result<(), StoreError> {
        let path = store.file(&self.name);
        let file = self.reopened(&path)?;
        if self.is_copied {
            return write_out(&self.mapping, &file).map_err(failed(&path, "writing RAM to"));
        }
        file.sync_all().map_err(failed(&path, "syncing RAM"))
    }

    /// Frees space that was reserved and stayed zero; returns the number of bytes.
    pub(super) fn release(&self, store: &Store) -> Result<u64, StoreError> {
        let path = store.file(&self.name);
        let file = self.reopened(&path)?;
        release_zeros(&file, self.mapping.region().len())
            .map_err(failed(&path, "giving back what stayed zero"))
    }

    /// Opens the file by its name, if it is still the created one with the same length.
    fn reopened(&self, path: &Path) -> Result<File, StoreError> {
        let changed = |what| StoreError::Changed { path: path.to_owned(), what };
        let file = match private::plain(path, OpenOptions::new().read(true).write(true)) {
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(changed("removed"));
            }
            other => other?,
        };
        let meta = file.metadata().map_err(failed(path, "looking at"))?;
        if (meta.dev(), meta.ino()) != self.identity {
            return Err(changed("replaced"));
        }
        if !self.is_copied && meta.len() < self.mapping.region().len() {
            return Err(changed("made shorter"));
        }
        Ok(file)
    }
}

/// Refuses a guest of `ram` bytes for which there is no room, on the disk and, if it is `held` in memory, there too.
pub(super) fn check_room(folder: &Path, ram: u64, held: bool) -> Result<(), StoreError> {
    let looking = |errno: rustix::io::Errno| failed(folder, "looking at its file system")(errno.into());
    let room = rustix::fs::statvfs(folder).map_err(looking)?;
    let kind = rustix::fs::statfs(folder).map_err(looking)?.f_type;
    let in_memory = IN_MEMORY.contains(&kind);
    let free = room.f_bavail.saturating_mul(room.f_frsize);
    // ramfs has no size, and reports 0 blocks.
    let on_disk = (room.f_blocks > 0).then(|| (free, "on its file system".to_owned()));
    let memory = memory_room().filter(|_| in_memory || held).map(|room| (room.bytes, room.bound.to_string()));
    match on_disk.into_iter().chain(memory).min() {
        Some((room, of)) if room < ram => Err(StoreError::NoRoom { path: folder.to_owned(), ram, room, of }),
        _ => Ok(()),
    }
}

/// True if the files of the folder are memory that a NIC can write to.
pub(super) fn is_tmpfs(folder: &Path) -> Result<bool, StoreError> {
    let kind = rustix::fs::statfs(folder).map_err(|errno| failed(folder, "looking at")(errno.into()))?;
    Ok(kind.f_type == IN_MEMORY[0])
}

/// Writes memory into its file; zero pieces stay holes.
fn write_out(mapping: &Mapping, file: &File) -> io::Result<()> {
    const PIECE: u64 = 1 << 20;
    let region = mapping.region();
    file.set_len(region.len())?;
    let mut buffer = vec![0; PIECE as usize];
    for at in (0..region.len()).step_by(PIECE as usize) {
        let span = region.span(at, PIECE.min(region.len() - at)).map_err(io::Error::other)?;
        if !is_zero(span) {
            let count = span.copy_to(&mut buffer);
            file.write_all_at(&buffer[..count], at)?;
        }
    }
    file.sync_all()
}
