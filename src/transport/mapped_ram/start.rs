//! Where the stream of a file begins that has something else in front of it, as libvirt's save images have.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::stream::qemu::file::encode_header;
use crate::stream::snapshot_note::INCREMENTAL;

/// Maximum number of bytes in front of a stream that is looked for: much more than the description of a machine.
const MAX_FRONT: u64 = 16 << 20;
/// Bytes that are read at once.
const READ: usize = 256 << 10;

/// The offset of the first word of QEMU's stream behind something else. `None` if the file begins with a stream, with a save
/// that did not end, or if there is no such word in its first 16 MiB. What follows that word was not looked at.
///
/// # Errors
/// The kernel's.
pub fn find_stream(file: &File) -> io::Result<Option<u64>> {
    let mut word = Vec::new();
    encode_header(&mut word);
    let mut first = [0; INCREMENTAL.len()];
    let got = file.read_at(&mut first, 0)?;
    if got < first.len() || first[..] == word[..] || first == INCREMENTAL || first == [0; 8] {
        return Ok(None);
    }
    let mut buffer = vec![0; READ];
    let mut at = 0;
    while at < MAX_FRONT {
        let got = file.read_at(&mut buffer, at)?;
        if let Some(found) = buffer[..got].windows(word.len()).position(|part| part == word) {
            return Ok(Some(at + found as u64));
        }
        // The word may lie across the end of what was read.
        match got.saturating_sub(word.len() - 1) {
            0 => break,
            new => at += new as u64,
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_first_word_is_found_wherever_it_lies_and_not_sought_where_a_stream_begins() {
        let mut word = Vec::new();
        encode_header(&mut word);
        let found = |bytes: &[u8]| {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            find_stream(&file).unwrap()
        };
        for front in [8, 4096, READ - 3, READ + 1, 3 * READ - 7] {
            let bytes = [&vec![b'<'; front][..], &word, &[1; 50]].concat();
            assert_eq!(found(&bytes), Some(front as u64));
            assert_eq!(found(&bytes[..front + word.len() - 1]), None, "cut");
        }
        for start in [&word[..], &INCREMENTAL, &[0; 8], b"short", b""] {
            assert_eq!(found(&[start, &word[..], &[0; 9]].concat()[..start.len().max(3)]), None);
        }
        assert_eq!(found(&[&[0; 8][..], &word].concat()), None, "a save that did not end");
        assert_eq!(found(&[&word[..], &word].concat()), None);
    }
}
