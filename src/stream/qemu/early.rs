//! Sections other than RAM whose format is known, so that the parser can skip them.
//!
//! - `.../virtio-mem-device-early`: a FULL section between `ram` START and the first page.
//! - `dirty-bitmap`: an iterable of its own, always a list of sized chunks.
//!
//! Both are passed on unchanged; only their lengths matter here.

use super::super::error::{DecodeError, Fault};
use super::super::reader::Reader;

/// The end of the name of an early virtio-mem section; the device's path comes before it.
pub const VIRTIO_MEM_SUFFIX: &str = "virtio-mem-device-early";
/// Name of the dirty-bitmap iterable.
pub const DIRTY_BITMAP: &str = "dirty-bitmap";
/// Version of the dirty-bitmap iterable.
pub const DIRTY_BITMAP_VERSION: u32 = 1;
/// Longest bitmap piece that is read, in bytes.
pub const MAX_BITMAP_BYTES: u64 = 64 << 20;
/// Longest plugged-block bitmap that is read, in bytes: a region of 2^40 blocks has 2^37.
pub const MAX_PLUGGED_BYTES: u64 = 64 << 20;

/// True if `idstr` names an early virtio-mem section.
pub fn is_early_virtio_mem(idstr: &str) -> bool {
    match idstr.strip_suffix(VIRTIO_MEM_SUFFIX) {
        Some(path) => path.is_empty() || path.ends_with('/'),
        None => false,
    }
}

/// The fields of an early virtio-mem section before its bitmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMem {
    /// Guest physical address of the region.
    pub addr: u64,
    /// Length of the region in bytes.
    pub region_size: u64,
    /// Unit of plugging in bytes, a power of two.
    pub block_size: u64,
    /// NUMA node.
    pub node: u32,
    /// Bytes that are plugged.
    pub plugged_size: u64,
}

impl VirtioMem {
    /// Bytes of the bitmap that follows: whole big-endian 64-bit words, bit i of word w being block 64 w + i.
    pub fn bitmap_len(&self) -> u64 {
        self.region_size.div_ceil(self.block_size.max(1)).div_ceil(64).saturating_mul(8)
    }
}

/// Decodes the head of an early virtio-mem section, 36 bytes; [`VirtioMem::bitmap_len`] bytes follow.
///
/// # Errors
///
/// [`Fault::Device`] if the sizes are invalid, [`Fault::Limit`] above [`MAX_PLUGGED_BYTES`];
/// [`DecodeError::Truncated`].
pub fn decode_virtio_mem(input: &[u8]) -> Result<(VirtioMem, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let mem = VirtioMem {
        addr: reader.be64()?,
        region_size: reader.be64()?,
        block_size: reader.be64()?,
        node: reader.be32()?,
        plugged_size: reader.be64()?,
    };
    if !mem.block_size.is_power_of_two() || mem.plugged_size > mem.region_size {
        let fault = Fault::Device("an early virtio-mem section has impossible sizes");
        return Err(DecodeError::corrupt(8, fault));
    }
    let value = mem.bitmap_len();
    if value > MAX_PLUGGED_BYTES {
        let what = "the length of a virtio-mem bitmap";
        return Err(DecodeError::corrupt(8, Fault::Limit { what, value, limit: MAX_PLUGGED_BYTES }));
    }
    Ok((mem, reader.position()))
}

/// How a chunk of a dirty-bitmap section affects the length of the section.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BitmapChunk {
    /// The section's payload ends with this chunk.
    Last,
    /// Another chunk follows.
    More,
    /// A bitmap of this many bytes follows, then another chunk, or the footer if `last`.
    Bits {
        /// Bytes that follow, at most [`MAX_BITMAP_BYTES`].
        len: u64,
        /// No further chunk follows.
        last: bool,
    },
}

/// The payload of an empty dirty-bitmap section.
pub const NOTHING: [u8; 1] = [EOS];

const EOS: u8 = 0x01;
const ZEROES: u8 = 0x02;
const BITMAP_NAME: u8 = 0x04;
const DEVICE_NAME: u8 = 0x08;
const START: u8 = 0x10;
const COMPLETE: u8 = 0x20;
const BITS: u8 = 0x40;
const MORE_FLAGS: u8 = 0x80;

/// Decodes the head of a chunk of a dirty-bitmap section: all of it except the bytes of a bitmap.
///
/// ```text
/// u8 flags: 01 last, 02 all zero, 04 bitmap name, 08 node name, 10 START, 20 COMPLETE, 40 BITS
/// [08: counted node name] [04: counted bitmap name]
/// START:    be32 granularity in bytes, u8 flags (1 enabled, 2 persistent, 4 autoload)
/// COMPLETE: nothing
/// BITS:     be64 first sector, be32 sectors, [unless 02: be64 length, so many bytes]
/// ```
///
/// # Errors
///
/// [`Fault::Device`] for flags that name two kinds of chunk or an extension that is not known; [`Fault::Name`];
/// [`Fault::Limit`]; [`DecodeError::Truncated`].
pub fn decode_bitmap_chunk(input: &[u8]) -> Result<(BitmapChunk, usize), DecodeError> {
    let mut reader = Reader::new(input);
    let flags = reader.u8()?;
    let kinds = (flags & (START | COMPLETE | BITS)).count_ones();
    if flags & MORE_FLAGS != 0 || kinds > 1 {
        let fault = Fault::Device("the flags of a dirty-bitmap chunk name no kind of chunk");
        return Err(DecodeError::corrupt(0, fault));
    }
    for (flag, what) in [(DEVICE_NAME, "node name"), (BITMAP_NAME, "bitmap name")] {
        if flags & flag != 0 {
            reader.name(what)?;
        }
    }
    let last = flags & EOS != 0;
    if flags & START != 0 {
        // be32 granularity in bytes, u8 flags.
        reader.array::<5>()?;
    }
    let mut len = 0;
    if flags & BITS != 0 {
        reader.array::<12>()?;
        if flags & ZEROES == 0 {
            let at = reader.position();
            len = reader.be64()?;
            if len > MAX_BITMAP_BYTES {
                let what = "the length of a dirty bitmap";
                return Err(DecodeError::corrupt(
                    at,
                    Fault::Limit { what, value: len, limit: MAX_BITMAP_BYTES },
                ));
            }
        }
    }
    let chunk = match (len, last) {
        (0, true) => BitmapChunk::Last,
        (0, false) => BitmapChunk::More,
        (len, last) => BitmapChunk::Bits { len, last },
    };
    Ok((chunk, reader.position()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::type_complexity)]
    use super::*;

    #[test]
    fn s16_early_virtio_mem_is_known_by_name_and_sized_exactly() {
        for (idstr, early) in [
            ("0000:00:01.0/virtio-mem-device-early", true),
            ("virtio-mem-device-early", true),
            ("0000:00:01.0/virtio-mem", false),
            ("evil-virtio-mem-device-early", false),
        ] {
            assert_eq!(is_early_virtio_mem(idstr), early, "{idstr}");
        }
        let mut head = Vec::new();
        for word in [0x1_0000_0000u64, 64 << 20, 2 << 20] {
            head.extend_from_slice(&word.to_be_bytes());
        }
        head.extend_from_slice(&[0; 12]);
        let (mem, used) = decode_virtio_mem(&head).unwrap();
        assert_eq!((used, mem.bitmap_len()), (36, 8));
        assert_eq!(decode_virtio_mem(&head[..35]), Err(DecodeError::Truncated { needed: 36, have: 35 }));
        head[16..24].fill(0);
        assert!(
            matches!(decode_virtio_mem(&head), Err(DecodeError::Corrupt(c)) if c.at == 8),
            "blocks of 0 bytes"
        );
        head[8..16].fill(0xff);
        head[23] = 1;
        let error = decode_virtio_mem(&head).unwrap_err();
        assert!(
            matches!(error, DecodeError::Corrupt(c) if matches!(c.fault, Fault::Limit { .. })),
            "2^64 blocks"
        );
    }

    #[test]
    fn s20_dirty_bitmap_chunks_say_where_they_end() {
        let bits = b"\x4c\x01n\x01b\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x10";
        #[rustfmt::skip]
        let cases: &[(&str, &[u8], Result<(BitmapChunk, usize), DecodeError>)] = &[
            ("nothing to migrate",  b"\x01",                          Ok((BitmapChunk::Last, 1))),
            ("start",               b"\x1c\x02d0\x02b0\0\x01\0\0\x03\x01", Ok((BitmapChunk::More, 12))),
            ("cut in the start",    b"\x1c\x02d0\x02b0\0\x01\0\0", Err(DecodeError::Truncated { needed: 12, have: 11 })),
            ("bits",                bits,                             Ok((BitmapChunk::Bits { len: 16, last: false }, 25))),
            ("zeroes",              b"\x42\0\0\0\0\0\0\0\0\0\0\0\x08", Ok((BitmapChunk::More, 13))),
            ("complete, last",      b"\x21",                          Ok((BitmapChunk::Last, 1))),
            ("two kinds",           b"\x30",                          Err(DecodeError::corrupt(0, Fault::Device("the flags of a dirty-bitmap chunk name no kind of chunk")))),
            ("more flags",          b"\x80\x01",                      Err(DecodeError::corrupt(0, Fault::Device("the flags of a dirty-bitmap chunk name no kind of chunk")))),
            ("empty name",          b"\x08\0",                        Err(DecodeError::corrupt(1, Fault::Name { what: "node name" }))),
            ("cut in the bits",     &bits[..20],                      Err(DecodeError::Truncated { needed: 25, have: 20 })),
        ];
        for (what, input, want) in cases {
            assert_eq!(decode_bitmap_chunk(input), *want, "{what}");
        }
        let mut huge = bits.to_vec();
        huge[17] = 1;
        assert!(
            matches!(decode_bitmap_chunk(&huge), Err(DecodeError::Corrupt(c)) if matches!(c.fault, Fault::Limit { .. }))
        );
    }
}
