//! Where pages of an already running guest are read from.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use twox_hash::XxHash3_128;

use super::{ChannelError, MappedDestination};
use crate::ram::PageBitmap;
use crate::sys::PageContents;
use crate::units::{BlockIndex, PageIndex, PageSize};

/// Unchanging memory, whose pages several threads may read in any order and in parallel.
pub trait PageSupply: Send + Sync {
    /// Fills `into` with the contents of a block from `offset` bytes on. Parts without data are zero.
    ///
    /// # Errors
    /// The bytes could not be read; the caller may try again.
    fn read(&self, block: BlockIndex, offset: u64, into: &mut [u8]) -> io::Result<()>;

    /// What errors call it.
    fn name(&self) -> String;
}

/// Adjacent bytes of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageSpan {
    /// The block, by the guest's own table.
    pub block: BlockIndex,
    /// Its first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// What is to be read, and what becomes of it.
pub trait PageReads {
    /// The next bytes to read; `None`: nothing for now.
    fn next(&mut self) -> Option<PageSpan>;

    /// A read has ended. Without an error this is what it brought, until the call returns.
    fn ended(&mut self, span: PageSpan, contents: io::Result<PageContents<'_>>);
}

/// Where the threads of a pager read.
pub trait PageReader: Send + Sync {
    /// Reads all that `reads` gives, until it gives nothing and every read has ended. `urgent`: threads wait for it. A
    /// caller that reads what is urgent waits for no other.
    fn read_all(&self, urgent: bool, reads: &mut dyn PageReads);

    /// What errors call it.
    fn name(&self) -> String;

    /// Nothing can be read any more, and trying again is of no use.
    fn is_gone(&self) -> bool {
        false
    }
}

/// Reads from a supply, one piece after the other.
pub(crate) struct OneByOne(pub(crate) Arc<dyn PageSupply>);

impl PageReader for OneByOne {
    fn read_all(&self, _urgent: bool, reads: &mut dyn PageReads) {
        let mut buffer = Vec::new();
        while let Some(span) = reads.next() {
            buffer.resize(usize::try_from(span.len).unwrap_or(0), 0);
            let read = self.0.read(span.block, span.offset, &mut buffer);
            reads.ended(span, read.map(|()| PageContents::Bytes(&buffer)));
        }
    }

    fn name(&self) -> String {
        self.0.name()
    }
}

/// What a key opens to the holder of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RemoteSpan {
    /// The memory, by the guest's own table.
    pub span: PageSpan,
    /// Address of its first byte for the NIC.
    pub address: u64,
    /// The NIC's key.
    pub rkey: u32,
}

/// Memory of a source that its destination reads, once it has keys.
pub trait PulledPages: PageReader {
    /// This memory can be read from here on.
    fn grant(&self, memory: RemoteSpan);

    /// Ends all reads. Again without effect.
    fn end(&self);

    /// Why nothing can be read any more; told once.
    fn take_failure(&self) -> Option<ChannelError>;
}

/// Unchanging memory in one piece: a file that contains nothing else, or the RAM blocks of a mapped-ram file, one after
/// the other in the order of its list.
pub struct StoredMemory {
    parts: Vec<Part>,
    contents: Contents,
}

struct Part {
    block: BlockIndex,
    start: u64,
    len: u64,
}

enum Contents {
    Plain { file: File, name: String },
    Mapped(super::MappedPages),
    Remote(super::RemoteMemory),
}

impl std::fmt::Debug for StoredMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoredMemory").field("name", &self.name()).field("len", &self.len()).finish()
    }
}

impl StoredMemory {
    /// A file that contains only memory. It must not change while it is used.
    ///
    /// # Errors
    /// It can't be opened, or is not a plain file.
    pub fn plain(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let about = file.metadata()?;
        if !about.is_file() {
            return Err(io::Error::other("it is no regular file, which mapped: needs"));
        }
        let parts = vec![Part { block: BlockIndex(0), start: 0, len: about.len() }];
        Ok(Self { parts, contents: Contents::Plain { file, name: path.display().to_string() } })
    }

    /// The memory in a mapped-ram file; blocks that are not in it are left out.
    pub fn mapped(file: &MappedDestination) -> Self {
        let pages = file.own_pages();
        let mut start = 0;
        let parts = pages.blocks().filter_map(|block| {
            let len = pages.len(block)?;
            start += len;
            Some(Part { block, start: start - len, len })
        });
        Self { parts: parts.collect(), contents: Contents::Mapped(pages) }
    }

    /// The memory that a page server has.
    pub fn remote(memory: super::RemoteMemory) -> Self {
        let parts = vec![Part { block: BlockIndex(0), start: 0, len: memory.len() }];
        Self { parts, contents: Contents::Remote(memory) }
    }

    /// 128 bits that another file has otherwise, and the same file after it was changed.
    pub fn identity(&self) -> [u8; 16] {
        match &self.contents {
            Contents::Plain { file, .. } => identity_of([file]),
            Contents::Mapped(pages) => identity_of(pages.files()),
            Contents::Remote(memory) => memory.identity(),
        }
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.start + part.len)
    }

    /// True for none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What errors call it.
    pub fn name(&self) -> String {
        match &self.contents {
            Contents::Plain { name, .. } => name.clone(),
            Contents::Mapped(pages) => pages.name(),
            Contents::Remote(memory) => memory.name(),
        }
    }

    /// Fills `into` from `offset` on.
    ///
    /// # Errors
    /// The error of read(2), or the file was made shorter meanwhile.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        match &self.contents {
            Contents::Plain { file, .. } => file.read_exact_at(into, offset),
            Contents::Remote(memory) => memory.read_at(offset, into),
            Contents::Mapped(pages) => {
                let (mut at, mut rest) = (offset, into);
                for part in &self.parts {
                    let end = part.start + part.len;
                    if rest.is_empty() || at < part.start || at >= end {
                        continue;
                    }
                    let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(rest.len());
                    let (here, behind) = rest.split_at_mut(len);
                    pages.read(part.block, at - part.start, here)?;
                    (at, rest) = (at + len as u64, behind);
                }
                if rest.is_empty() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
            }
        }
    }

    /// Which pages of a part of it hold data, the first one at `offset`: the others are zero.
    pub fn present(&self, offset: u64, len: u64, page: PageSize) -> PageBitmap {
        let mut map = PageBitmap::new(len / page.bytes());
        let end = offset.saturating_add(len);
        // Any data in a page makes it one that holds data.
        let mut mark = |from: u64, to: u64| {
            let (from, to) = (from.clamp(offset, end) - offset, to.clamp(offset, end) - offset);
            if from < to {
                map.set_range(from / page.bytes()..to.div_ceil(page.bytes()));
            }
        };
        match &self.contents {
            Contents::Plain { file, .. } => data(file, offset, end, mark),
            Contents::Remote(memory) => {
                if let Err(error) = memory.present(offset, end, &mut mark) {
                    tracing::warn!(%error, "all pages are requested, since it is not known which have contents");
                    mark(offset, end);
                }
            }
            Contents::Mapped(pages) => {
                for part in &self.parts {
                    let Some(present) = pages.present(part.block) else { continue };
                    let own = part.len / present.len().max(1);
                    let mut from = PageIndex(0);
                    while let Some(run) = present.next_run(from, u64::MAX) {
                        mark(part.start + run.start * own, part.start + run.end * own);
                        from = PageIndex(run.end);
                    }
                }
            }
        }
        map
    }
}

fn identity_of<'a>(files: impl IntoIterator<Item = &'a File>) -> [u8; 16] {
    let mut bytes = Vec::new();
    for about in files.into_iter().filter_map(|file| file.metadata().ok()) {
        for number in [about.dev(), about.ino(), about.len(), about.mtime() as u64, about.mtime_nsec() as u64]
        {
            bytes.extend(number.to_le_bytes());
        }
    }
    XxHash3_128::oneshot(&bytes).to_be_bytes()
}

/// Calls back for the runs of a file that are not holes. A file system that does not report holes has none. A part by
/// which the file was truncated since it was opened is no hole: it can't be read.
fn data(file: &File, mut at: u64, end: u64, mut mark: impl FnMut(u64, u64)) {
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(_) => at,
        };
        if start >= end {
            break;
        }
        let stop = seek(file, SeekFrom::Hole(start)).ok().filter(|stop| *stop > start).unwrap_or(end);
        mark(start, stop);
        at = stop;
    }
    // Read after the search, so that a truncation in the middle of it is noticed.
    let len = file.metadata().map_or(0, |about| about.len());
    mark(len.min(end), end);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn holes_of_a_plain_file_are_known_and_nothing_is_read_behind_its_end() {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
        let path = folder.path().join("memory");
        let file = File::create(&path).unwrap();
        file.set_len(64 * 4096).unwrap();
        file.write_all_at(&[7; 100], 5 * 4096 + 50).unwrap();
        file.write_all_at(&[8; 8192], 30 * 4096).unwrap();
        let stored = StoredMemory::plain(&path).unwrap();
        assert_eq!(stored.len(), 64 * 4096);
        let map = stored.present(4 * 4096, 60 * 4096, PageSize::SIZE_4K);
        assert_eq!(
            (map.len(), map.count(), map.get(PageIndex(1)), map.get(PageIndex(26))),
            (60, 3, true, true)
        );
        let mut bytes = [1; 4096];
        stored.read_at(5 * 4096, &mut bytes).unwrap();
        assert!(bytes[..50] == [0; 50] && bytes[50..150] == [7; 100]);
        assert!(stored.read_at(63 * 4096 + 1, &mut bytes).is_err());
        assert!(StoredMemory::plain(Path::new("/dev/null")).is_err());
        // The truncated part is not zero.
        file.set_len(20 * 4096).unwrap();
        let map = stored.present(0, 64 * 4096, PageSize::SIZE_4K);
        assert_eq!((map.count(), map.get(PageIndex(19)), map.get(PageIndex(20))), (45, false, true));
    }
}
