//! Fixed-size records in payloads.

/// A fixed-size record in a payload.
pub trait Record: Sized {
    /// Bytes on the wire.
    const BYTES: usize;
    /// Reads the record from exactly [`BYTES`](Self::BYTES) bytes; shorter input reads as zeros.
    fn read(bytes: &[u8]) -> Self;
    /// Appends the record's bytes.
    fn write(&self, out: &mut Vec<u8>);
}

/// Requests a key ([`Kind::RegisterRequest`](super::Kind::RegisterRequest)) or returns one
/// ([`Kind::UnregisterRequest`](super::Kind::UnregisterRequest)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterRecord {
    /// To register: the destination's label of the block plus the offset in the block, bytes.
    /// To unregister: the plain index of the first chunk.
    pub key: u64,
    /// Position of the block in the announced list.
    pub block: u32,
    /// Number of chunks after the first one that the key must also cover.
    pub extra_chunks: u64,
}

impl Record for RegisterRecord {
    const BYTES: usize = 24;

    fn read(bytes: &[u8]) -> Self {
        Self { key: be64(bytes, 0), block: be32(bytes, 8), extra_chunks: be64(bytes, 16) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.key.to_be_bytes());
        out.extend_from_slice(&self.block.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.extra_chunks.to_be_bytes());
    }
}

/// A granted key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RegisterResult {
    /// Remote key for RDMA WRITEs; never zero.
    pub rkey: u32,
    /// Remote address of the first byte of the *block* (not of the chunk).
    pub block_base: u64,
}

impl Record for RegisterResult {
    const BYTES: usize = 16;

    fn read(bytes: &[u8]) -> Self {
        Self { rkey: be32(bytes, 0), block_base: be64(bytes, 8) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.rkey.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.block_base.to_be_bytes());
    }
}

/// A range that reads as zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compress {
    /// Position of the block in the announced list.
    pub block: u32,
    /// The destination's label of the block plus the offset in the block, bytes.
    pub key: u64,
    /// Bytes to zero.
    pub length: u64,
}

impl Record for Compress {
    const BYTES: usize = 24;

    fn read(bytes: &[u8]) -> Self {
        Self { block: be32(bytes, 4), key: be64(bytes, 8), length: be64(bytes, 16) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.block.to_be_bytes());
        out.extend_from_slice(&self.key.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }
}

/// The destination's view of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockRecord {
    /// Remote address of the block's first byte, as a label: `base + offset` is where to write.
    pub base: u64,
    /// The destination's label of the block, to be added to offsets in keys.
    pub label: u64,
    /// Bytes in the block; the source compares it with its own.
    pub length: u64,
    /// Key of the whole block with pin-all; otherwise zero.
    pub rkey: u32,
}

impl Record for BlockRecord {
    const BYTES: usize = 32;

    fn read(bytes: &[u8]) -> Self {
        Self { base: be64(bytes, 0), label: be64(bytes, 8), length: be64(bytes, 16), rkey: be32(bytes, 24) }
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.base.to_be_bytes());
        out.extend_from_slice(&self.label.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
        out.extend_from_slice(&self.rkey.to_be_bytes());
        out.extend_from_slice(&[0; 4]);
    }
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}
