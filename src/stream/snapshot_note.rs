//! Which snapshot a mapped-ram file holds, and against which one it was taken: a note after the stream.
//!
//! A QEMU reads the stream to its end and nothing after it. A file without a base is a mapped-ram file like any other.
//! One with a base holds only the pages that have changed since; no other program must take it for a whole guest, so
//! its stream begins with [`INCREMENTAL`] in place of QEMU's first word. All else is the same.
//!
//! ```text
//! be16 version   16 bytes id   u8 1 if there is a base, else 0
//! of a base: 16 bytes id   be64 where its stream begins   be16 length   its path, from the folder of the file on
//! be32 length of all that   be64 XXH3 of all that   "RWNOTE\r\n"; the file ends here
//! ```

use std::io;

use twox_hash::XxHash3_64;

use super::reader::Reader;
use super::writer::Writer;

/// At the start of a file with a base, where another one has QEMU's magic and version.
pub const INCREMENTAL: [u8; 8] = *b"RWIS\0\0\0\x01";

const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"RWNOTE\r\n";
/// Bytes after the note's own: length, hash, magic.
const END: usize = 4 + 8 + 8;
/// Maximum number of bytes of a note: a path has at most 4096.
const MAX_NOTE: u32 = 8192;

/// Which snapshot it is: 128 bits that no other one has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SnapshotId(pub [u8; 16]);

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The note of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotNote {
    /// Which snapshot it holds.
    pub id: SnapshotId,
    /// It holds only the changes since this one.
    pub base: Option<BaseNote>,
}

/// Another snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseNote {
    /// Which one.
    pub id: SnapshotId,
    /// Its path, relative to the folder of the file that names it.
    pub path: String,
    /// Offset in it at which its stream begins.
    pub starts_at: u64,
}

/// A note that makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NoteError {
    /// Its length.
    #[error("says that it has {0} bytes")]
    Length(u32),
    /// Its hash.
    #[error("is damaged: its hash differs")]
    Hash,
    /// Of a later ramwire.
    #[error("has version {0}, and this ramwire knows 1")]
    Version(u16),
    /// Its fields.
    #[error("is damaged: its fields do not fill it")]
    Fields,
}

impl SnapshotNote {
    /// Appends the note, which goes to the end of the file.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut body = Vec::new();
        let mut writer = Writer::new(&mut body);
        writer.be16(VERSION).bytes(&self.id.0).u8(self.base.is_some().into());
        if let Some(base) = &self.base {
            let path = base.path.as_bytes();
            writer.bytes(&base.id.0).be64(base.starts_at);
            writer.be16(u16::try_from(path.len()).unwrap_or(u16::MAX)).bytes(path);
        }
        let (len, hash) = (u32::try_from(body.len()).unwrap_or(u32::MAX), XxHash3_64::oneshot(&body));
        Writer::new(out).bytes(&body).be32(len).be64(hash).bytes(&MAGIC);
    }

    /// Looks for a note at the end of a file of `file_len` bytes; `read` fills a buffer from an offset on. Returns it
    /// and how many bytes it has; `None` if the file does not end with one.
    ///
    /// # Errors
    /// The errors of `read`; [`NoteError`] as the source of an error of kind [`io::ErrorKind::InvalidData`].
    pub fn find(
        file_len: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<Option<(Self, u64)>> {
        let Some(end_at) = file_len.checked_sub(END as u64) else { return Ok(None) };
        let mut end = [0; END];
        read(end_at, &mut end)?;
        if end[12..] != MAGIC {
            return Ok(None);
        }
        let mut reader = Reader::new(&end);
        let len = reader.be32().map_err(|_| invalid(NoteError::Fields))?;
        let hash = reader.be64().map_err(|_| invalid(NoteError::Fields))?;
        let Some(at) = end_at.checked_sub(len.into()).filter(|_| len <= MAX_NOTE) else {
            return Err(invalid(NoteError::Length(len)));
        };
        let mut body = vec![0; len as usize];
        read(at, &mut body)?;
        if XxHash3_64::oneshot(&body) != hash {
            return Err(invalid(NoteError::Hash));
        }
        let note = Self::decode(&body).map_err(invalid)?;
        Ok(Some((note, file_len - at)))
    }

    fn decode(body: &[u8]) -> Result<Self, NoteError> {
        let mut reader = Reader::new(body);
        let version = reader.be16().map_err(|_| NoteError::Fields)?;
        if version != VERSION {
            return Err(NoteError::Version(version));
        }
        Self::fields(&mut reader).filter(|_| reader.position() == body.len()).ok_or(NoteError::Fields)
    }

    fn fields(reader: &mut Reader<'_>) -> Option<Self> {
        fn id(reader: &mut Reader<'_>) -> Option<SnapshotId> {
            reader.bytes(16).ok()?.try_into().ok().map(SnapshotId)
        }
        let own = id(reader)?;
        let base = match reader.u8().ok()? {
            0 => None,
            1 => {
                let (id, starts_at) = (id(reader)?, reader.be64().ok()?);
                let len = reader.be16().ok()?;
                let path = std::str::from_utf8(reader.bytes(len.into()).ok()?).ok()?.to_owned();
                Some(BaseNote { id, path, starts_at })
            }
            _ => return None,
        };
        Some(Self { id: own, base })
    }
}

fn invalid(error: NoteError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn found(file: &[u8]) -> io::Result<Option<(SnapshotNote, u64)>> {
        SnapshotNote::find(file.len() as u64, |at, into| {
            let at = at as usize;
            into.copy_from_slice(&file[at..at + into.len()]);
            Ok(())
        })
    }

    fn notes() -> [SnapshotNote; 2] {
        let base = BaseNote { id: SnapshotId([7; 16]), path: "dir/a base".into(), starts_at: 4096 };
        [
            SnapshotNote { id: SnapshotId([9; 16]), base: None },
            SnapshotNote { id: SnapshotId([8; 16]), base: Some(base) },
        ]
    }

    #[test]
    fn a_note_is_found_at_the_end_of_whatever_stands_in_front_of_it() {
        for note in notes() {
            for before in [0, 1, 5000] {
                let mut file = vec![0x55; before];
                note.encode(&mut file);
                let len = (file.len() - before) as u64;
                assert_eq!(found(&file).unwrap(), Some((note.clone(), len)));
                file.push(0);
                assert_eq!(found(&file).unwrap(), None, "not at the end");
            }
        }
        assert_eq!(found(&[]).unwrap(), None);
        assert_eq!(notes()[0].id.to_string(), "09".repeat(16));
    }

    /// Each byte changed, and each length cut from the front: an answer, and never another note.
    #[test]
    fn a_damaged_note_is_refused_or_none() {
        for note in notes() {
            let mut file = Vec::new();
            note.encode(&mut file);
            for at in 0..file.len() {
                for bit in 0..8 {
                    let mut bad = file.clone();
                    bad[at] ^= 1 << bit;
                    let refused = match found(&bad) {
                        Ok(found) => found.is_none(),
                        Err(error) => error.kind() == io::ErrorKind::InvalidData,
                    };
                    assert!(refused, "byte {at}, bit {bit}");
                }
                assert!(at == 0 || !matches!(found(&file[at..]), Ok(Some(_))), "cut at {at}");
            }
        }
    }
}
