//! A file and the bases that it was taken against: where each page is read from.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::file::MappedFile;
use crate::ram::PageBitmap;
use crate::stream::qemu::file::encode_header;
use crate::stream::qemu::incoming::IncomingConfig;
use crate::stream::qemu::mapped::decode_bitmap;
use crate::stream::qemu::mapped_stream::{MappedReadError, Places, PlainStream};
use crate::stream::snapshot_chain::{ChainError, MAX_SNAPSHOTS, SnapshotChain};
use crate::stream::snapshot_note::{BaseNote, INCREMENTAL, SnapshotNote};

/// One file of the chain.
struct Layer {
    file: Arc<MappedFile>,
    places: Vec<Places>,
}

/// All files of the chain, the requested one first. Blocks are those of its list.
pub(super) struct Layers {
    layers: Vec<Layer>,
    chain: SnapshotChain,
}

/// A file of a chain, read but for its pages.
pub(super) struct Opened {
    pub(super) file: Arc<MappedFile>,
    pub(super) stream: PlainStream,
    pub(super) note: Option<SnapshotNote>,
    present: Vec<PageBitmap>,
}

impl Opened {
    /// Reads all of a file but its pages.
    pub(super) fn read(file: MappedFile) -> Result<Self, MappedReadError> {
        let starts_at = file.starts_at;
        let at_end = |source| MappedReadError::Io { at: starts_at, source };
        let len = file.len().map_err(at_end)?;
        let note = SnapshotNote::find(len, |at, into| file.read_all(into, at)).map_err(|source| {
            if source.kind() == io::ErrorKind::InvalidData {
                return MappedReadError::Note { source };
            }
            at_end(source)
        })?;
        let (note, note_len) = note.map_or((None, 0), |(note, len)| (Some(note), len));
        let mut word = [0; INCREMENTAL.len()];
        let got = file.read(&mut word, starts_at).map_err(at_end)?;
        let is_incremental = got == word.len() && word == INCREMENTAL;
        if is_incremental != note.as_ref().is_some_and(|note| note.base.is_some()) && word != [0; 8] {
            return Err(MappedReadError::NoNote { is_incremental });
        }
        let end = len - note_len;
        let config = IncomingConfig {
            starts_at,
            file_len: Some(end),
            adopt_page_size: true,
            ..IncomingConfig::default()
        };
        let stream = PlainStream::read(config, |at, into| {
            // The note is no part of the stream, and the first word of an incremental stream replaces QEMU's.
            let room = usize::try_from(end.saturating_sub(at)).unwrap_or(usize::MAX).min(into.len());
            let got = file.read(&mut into[..room], at)?;
            if is_incremental && at == starts_at && got >= word.len() {
                let mut first = Vec::new();
                encode_header(&mut first);
                into[..first.len()].copy_from_slice(&first);
            }
            Ok(got)
        })?;
        let present = stream.places.iter().map(|places| read_bitmap(&file, places));
        let present = present.collect::<Result<_, _>>()?;
        Ok(Self { file: Arc::new(file), stream, note, present })
    }
}

fn read_bitmap(file: &MappedFile, places: &Places) -> Result<PageBitmap, MappedReadError> {
    if places.header.is_absent() {
        return Ok(PageBitmap::new(0));
    }
    // Not more than the file has: its places were compared with its length.
    let mut bytes = vec![0; usize::try_from(places.bitmap_len()).unwrap_or(usize::MAX)];
    let at = places.header.bitmap_offset;
    file.read_all(&mut bytes, at).map_err(|source| MappedReadError::Io { at, source })?;
    let present = decode_bitmap(&bytes, places.block.name.as_str(), places.pages());
    Ok(present.map_err(|error| error.based(at.saturating_sub(file.starts_at)))?)
}

impl Layers {
    /// The files that `first` needs, as its note and theirs name them.
    pub(super) fn of(first: &Opened) -> Result<Self, MappedReadError> {
        let layer =
            |opened: &Opened| Layer { file: Arc::clone(&opened.file), places: opened.stream.places.clone() };
        let chain = SnapshotChain::new(first.note.as_ref(), first.present.clone());
        let mut this = Self { layers: vec![layer(first)], chain };
        let mut path = first.file.path().to_owned();
        while let Some(note) = this.chain.next_base().map_err(|error| refused(error, &path))? {
            path = in_folder_of(&path, &note.path);
            let opened = open_base(&path, note)?;
            let added = this.chain.add(opened.note.as_ref(), &opened.present);
            added.map_err(|error| refused(error, &path))?;
            if let Some(block) = differs(&first.stream.places, &opened.stream.places) {
                return Err(MappedReadError::UnlikeBase { base: path.display().to_string(), block });
            }
            this.layers.push(layer(&opened));
        }
        Ok(this)
    }

    /// Pages that a file of the chain has, block by block; of a block that was left out, none.
    pub(super) fn present(&self) -> &[PageBitmap] {
        self.chain.present()
    }

    /// Files, the requested one first.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<MappedFile>> {
        self.layers.iter().map(|layer| &layer.file)
    }

    /// The next pages of a block from `from` on that one file has, that file, and their position in it. All pages
    /// between are zero.
    pub(super) fn next_run(
        &self,
        block: usize,
        from: u64,
        most: u64,
    ) -> Option<(&MappedFile, Range<u64>, u64)> {
        let (number, run) = self.chain.next_run(block, from, most)?;
        let layer = self.layers.get(number)?;
        let header = layer.places.get(block)?.header;
        let at = header.pages_offset.saturating_add(run.start.saturating_mul(header.page_size.bytes()));
        Some((&*layer.file, run, at))
    }

    /// The last base.
    pub(super) fn lowest(&self, block: usize) -> Option<(&MappedFile, &PageBitmap, &Places)> {
        let (number, layer) = self.layers.iter().enumerate().next_back()?;
        let own = self.chain.own(number, block)?;
        Some((&layer.file, own, layer.places.get(block)?))
    }
}

/// Resolves `path` from the folder of `file`.
pub(super) fn in_folder_of(file: &Path, path: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new("")).join(path)
}

fn open_base(path: &Path, note: &BaseNote) -> Result<Opened, MappedReadError> {
    let base = || path.display().to_string();
    let file = MappedFile::to_read(path, note.starts_at)
        .map_err(|source| MappedReadError::NoBase { base: base(), source })?;
    Opened::read(file).map_err(|source| MappedReadError::BadBase { base: base(), source: Box::new(source) })
}

/// What lies at `path` is not the next of the chain.
fn refused(error: ChainError, path: &Path) -> MappedReadError {
    match error {
        ChainError::Other { wanted, found } => {
            MappedReadError::OtherBase { base: path.display().to_string(), wanted, found }
        }
        ChainError::Long => MappedReadError::LongChain { most: MAX_SNAPSHOTS },
    }
}

/// The first block that is not the same in both lists.
fn differs(ours: &[Places], theirs: &[Places]) -> Option<String> {
    let is_like = |ours: &Places, theirs: &Places| {
        ours.block.name == theirs.block.name
            && ours.block.used_length == theirs.block.used_length
            && ours.header.page_size == theirs.header.page_size
            && ours.header.is_absent() == theirs.header.is_absent()
    };
    let longer = if ours.len() >= theirs.len() { ours } else { theirs };
    let at = ours.iter().zip(theirs).position(|(ours, theirs)| !is_like(ours, theirs));
    let at = at.or_else(|| (ours.len() != theirs.len()).then(|| ours.len().min(theirs.len())))?;
    longer.get(at).map(|places| places.block.name.to_string())
}
