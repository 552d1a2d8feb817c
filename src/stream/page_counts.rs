//! Page counts as two ramwires exchange them: three numbers of 64 bits each, big endian.

use super::reader::Reader;
use super::writer::Writer;
use crate::observe::PageCounts;

/// Bytes of one count on the wire.
pub const LEN: usize = 24;

/// The counts, one after the other.
pub fn encode(counts: &[PageCounts]) -> Vec<u8> {
    let mut out = Vec::with_capacity(counts.len() * LEN);
    let mut writer = Writer::new(&mut out);
    for count in counts {
        writer.be64(count.normal).be64(count.zero).be64(count.delta);
    }
    out
}

/// The counts in `bytes`; an incomplete last one is left out.
pub fn decode(bytes: &[u8]) -> Vec<PageCounts> {
    let count = |bytes| {
        let mut reader = Reader::new(bytes);
        let (normal, zero) = (reader.be64().ok()?, reader.be64().ok()?);
        Some(PageCounts { normal, zero, delta: reader.be64().ok()? })
    };
    bytes.chunks_exact(LEN).filter_map(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_survive_the_wire() {
        let counts = [
            PageCounts { normal: 1, zero: 2, delta: 3 },
            PageCounts { normal: u64::MAX, ..PageCounts::default() },
        ];
        let bytes = encode(&counts);
        assert_eq!(bytes.len(), 2 * LEN);
        assert_eq!(decode(&bytes), counts);
        assert_eq!(decode(&bytes[..LEN + 3]), counts[..1]);
    }
}
