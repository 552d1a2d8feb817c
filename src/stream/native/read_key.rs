//! Keys with which a destination reads missing pages from its source's memory.

/// A key, and the memory that it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadKey {
    /// Names it where the destination reports that it has all pages behind it.
    pub number: u32,
    /// Position of the block in the stream's list.
    pub block: u32,
    /// First byte in the block.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Address of the first byte for the NIC.
    pub address: u64,
    /// The NIC's key.
    pub rkey: u32,
}

impl ReadKey {
    /// Bytes of one on the wire.
    pub const LEN: usize = 36;

    /// Numbers in big endian, in the order of the fields.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend(self.number.to_be_bytes());
        out.extend(self.block.to_be_bytes());
        for number in [self.start, self.len, self.address] {
            out.extend(number.to_be_bytes());
        }
        out.extend(self.rkey.to_be_bytes());
    }

    /// The keys in `bytes`; an incomplete last one is ignored.
    pub fn decode_all(bytes: &[u8]) -> impl Iterator<Item = Self> {
        bytes.chunks_exact(Self::LEN).map(|record| {
            let half = |at: usize| {
                record.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
            };
            let whole = |at: usize| u64::from(half(at)) << 32 | u64::from(half(at + 4));
            Self {
                number: half(0),
                block: half(4),
                start: whole(8),
                len: whole(16),
                address: whole(24),
                rkey: half(32),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_as_they_were_written() {
        let key = ReadKey { number: 1, block: 2, start: 3 << 33, len: 4, address: u64::MAX - 5, rkey: 6 };
        let other = ReadKey { number: 7, ..key };
        let mut bytes = Vec::new();
        key.encode(&mut bytes);
        other.encode(&mut bytes);
        assert_eq!(bytes.len(), 2 * ReadKey::LEN);
        bytes.push(1);
        assert_eq!(ReadKey::decode_all(&bytes).collect::<Vec<_>>(), [key, other]);
    }
}
