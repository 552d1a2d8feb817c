//! What is inspected: a pipe, or a file with its note.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use ramwire::error::Chain;
use ramwire::stream::snapshot_note::SnapshotNote;
use ramwire::transport::{Address, MappedDestination, Target, find_stream};

use crate::cli::output::note;

/// Source of a stream.
pub(super) enum Input<R> {
    /// Only forwards.
    Pipe(R),
    /// A file, where its stream ends, and where it begins: the pages in it need not be read.
    File(File, u64, u64),
}

/// What a file says of itself behind its stream, and why the snapshot can't be used without another file.
pub(super) type Noted = Option<(SnapshotNote, Option<String>)>;

impl<R: Read> Read for Input<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Pipe(input) => input.read(into),
            Self::File(file, end, _) => {
                let left = end.saturating_sub(file.stream_position().unwrap_or(0));
                let room = usize::try_from(left).unwrap_or(usize::MAX).min(into.len());
                file.read(&mut into[..room])
            }
        }
    }
}

/// A path, or an address with `mapped:`.
pub(super) fn open(name: &Path) -> io::Result<(Input<io::Empty>, Noted)> {
    let address = name.to_str().filter(|name| name.starts_with("mapped:")).map(str::parse);
    let address: Option<Address> = address.transpose().map_err(io::Error::other)?;
    let (path, offset) = match address.as_ref().map(Address::target) {
        Some(Target::PathAt { path, offset }) => (path.as_path(), *offset),
        _ => (name, 0),
    };
    let mut file = File::open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Ok((Input::File(file, u64::MAX, 0), None));
    }
    let note = SnapshotNote::find(meta.len(), |at, into| file.read_exact_at(into, at));
    let (note, len) = match note {
        Ok(note) => note.map_or((None, 0), |(note, len)| (Some(note), len)),
        // What it would say is found missing below.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => (None, 0),
        Err(error) => return Err(error),
    };
    let noted = note.map(|note| {
        let why = note.base.is_some().then(|| unusable(path, offset)).flatten();
        (note, why)
    });
    let mut offset = offset;
    if offset == 0
        && let Some(found) = find_stream(&file)?
    {
        note!("ramwire inspect: the stream begins at {found}: mapped:{},offset={found}", path.display());
        offset = found;
    }
    file.seek(SeekFrom::Start(offset))?;
    Ok((Input::File(file, meta.len() - len, offset), noted))
}

/// Why the chain of files that begins with this one can't be read.
fn unusable(path: &Path, offset: u64) -> Option<String> {
    let address = match offset {
        0 => format!("mapped:{}", path.display()),
        _ => format!("mapped:{},offset={offset}", path.display()),
    };
    let address: Address = address.parse().ok()?;
    MappedDestination::open(&address).err().map(|error| Chain(&error).to_string())
}
