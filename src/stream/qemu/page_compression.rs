//! The compressed payload of multifd packets: one zlib stream or one zstd frame for the life of a channel.
//!
//! Each packet ends with a flush, so that its pages can be decompressed without the next packet. The stream or frame is
//! never finished.

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};
use zstd::stream::raw::{CParameter, DParameter, Decoder, Encoder, InBuffer, Operation, OutBuffer};

use super::super::error::Fault;
use super::multifd::Method;

/// Largest zstd window that is accepted: 32 MiB, which the highest level that QEMU offers (20) requires.
const MAX_WINDOW_LOG: u32 = 25;
/// Bytes by which the output buffer grows at a time.
const STEP: usize = 64 << 10;

/// How a sender compresses the pages of its channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageCompression {
    /// Not at all.
    #[default]
    Plain,
    /// zlib, level 0 to 9.
    Zlib(u8),
    /// zstd, level 0 to 20; 0 is the library's own choice.
    Zstd(u8),
}

impl PageCompression {
    /// The compression method in the packets.
    pub fn method(self) -> Method {
        match self {
            Self::Plain => Method::Plain,
            Self::Zlib(_) => Method::Zlib,
            Self::Zstd(_) => Method::Zstd,
        }
    }
}

impl std::fmt::Display for PageCompression {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain => f.write_str("none"),
            Self::Zlib(level) => write!(f, "zlib:{level}"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
        }
    }
}

/// An unknown compression setting.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("compression {0:?} is unknown: use none, zlib[:0 to 9] or zstd[:0 to 20]")]
pub struct UnknownCompression(String);

impl std::str::FromStr for PageCompression {
    type Err = UnknownCompression;

    /// `none`, `zlib` or `zstd`, optionally with `:LEVEL`; the default level is 1, as in QEMU.
    fn from_str(text: &str) -> Result<Self, UnknownCompression> {
        let unknown = || UnknownCompression(text.to_owned());
        let (name, level) = text.split_once(':').unwrap_or((text, "1"));
        let level: u8 = level.parse().map_err(|_| unknown())?;
        match (name, level) {
            ("none", _) if text == "none" => Ok(Self::Plain),
            ("zlib", 0..=9) => Ok(Self::Zlib(level)),
            ("zstd", 0..=20) => Ok(Self::Zstd(level)),
            _ => Err(unknown()),
        }
    }
}

/// Compresses the packets of one channel.
pub struct PacketDeflater(Deflate);

enum Deflate {
    Plain,
    Zlib(Box<Compress>),
    Zstd(Box<Encoder<'static>>),
}

impl std::fmt::Debug for PacketDeflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketDeflater").finish_non_exhaustive()
    }
}

impl PacketDeflater {
    /// A channel before its first packet.
    ///
    /// # Errors
    ///
    /// The library's error: no memory for its tables.
    pub fn new(compression: PageCompression) -> std::io::Result<Self> {
        Ok(Self(match compression {
            PageCompression::Plain => Deflate::Plain,
            PageCompression::Zlib(level) => {
                Deflate::Zlib(Box::new(Compress::new(Compression::new(level.into()), true)))
            }
            PageCompression::Zstd(level) => {
                let mut encoder = Encoder::new(level.into())?;
                // The header of a frame without size and checksum is the same as that of a stream.
                encoder.set_parameter(CParameter::ChecksumFlag(false))?;
                Deflate::Zstd(Box::new(encoder))
            }
        }))
    }

    /// True if payloads are not compressed.
    pub fn is_plain(&self) -> bool {
        matches!(self.0, Deflate::Plain)
    }

    /// Appends the payload of a packet whose pages are `pages` to `out`; uncompressed, it is the pages themselves.
    ///
    /// # Errors
    ///
    /// The library's error; the channel is then unusable.
    pub fn deflate(&mut self, pages: &[u8], out: &mut Vec<u8>) -> std::io::Result<()> {
        match &mut self.0 {
            Deflate::Plain => out.extend_from_slice(pages),
            Deflate::Zlib(stream) => {
                let begun = stream.total_in();
                loop {
                    out.reserve(STEP);
                    let taken = (stream.total_in() - begun) as usize;
                    let rest = pages.get(taken..).unwrap_or(&[]);
                    stream.compress_vec(rest, out, FlushCompress::Sync)?;
                    // If room is left in the output, the flush is complete.
                    if stream.total_in() - begun == pages.len() as u64 && out.len() < out.capacity() {
                        break;
                    }
                }
            }
            Deflate::Zstd(encoder) => {
                let mut taken = 0;
                loop {
                    let at = out.len();
                    out.resize(at + STEP, 0);
                    let room = &mut out[at..];
                    let (status, flushing) = if taken < pages.len() {
                        let status = encoder.run_on_buffers(&pages[taken..], room)?;
                        taken += status.bytes_read;
                        (status.bytes_written, true)
                    } else {
                        let mut room = OutBuffer::around(room);
                        let left = encoder.flush(&mut room)?;
                        (room.pos(), left > 0)
                    };
                    out.truncate(at + status);
                    if !flushing {
                        break;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Expands the packets of one channel.
pub struct PacketInflater(Inflate);

enum Inflate {
    Zlib(Box<Decompress>),
    Zstd(Box<Decoder<'static>>),
}

impl std::fmt::Debug for PacketInflater {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PacketInflater").finish_non_exhaustive()
    }
}

impl PacketInflater {
    /// A channel before its first packet; `None` if payloads are the pages themselves.
    ///
    /// # Errors
    ///
    /// The library's error: no memory for its tables.
    pub fn new(method: Method) -> std::io::Result<Option<Self>> {
        Ok(match method {
            Method::Plain => None,
            Method::Zlib => Some(Self(Inflate::Zlib(Box::new(Decompress::new(true))))),
            Method::Zstd => {
                let mut decoder = Decoder::new()?;
                decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
                Some(Self(Inflate::Zstd(Box::new(decoder))))
            }
        })
    }

    /// Expands the payload of one packet into `out`, which it must fill exactly.
    ///
    /// # Errors
    ///
    /// [`Fault::Multifd`] if it is invalid, or gives more or fewer bytes; the channel is then unusable.
    pub fn inflate(&mut self, mut payload: &[u8], out: &mut [u8]) -> Result<(), Fault> {
        let broken = || Fault::Multifd("the payload of a packet does not inflate");
        let size = Fault::Multifd("the payload of a packet does not give exactly its pages");
        let mut filled = 0;
        // One byte of room after the pages lets the decoder process the end of the packet, and detects excess output.
        // The decoder may hold output back until there is room, so it is called until it makes no more progress.
        let mut beyond = [0u8; 1];
        while filled <= out.len() {
            let room = out.get_mut(filled..).filter(|room| !room.is_empty()).unwrap_or(&mut beyond);
            let (taken, given) = self.step(payload, room).ok_or_else(broken)?;
            payload = payload.get(taken..).unwrap_or(&[]);
            filled += given;
            if taken == 0 && given == 0 {
                break;
            }
        }
        if !payload.is_empty() && filled <= out.len() {
            return Err(broken());
        }
        if filled == out.len() { Ok(()) } else { Err(size) }
    }

    /// Bytes taken and given.
    fn step(&mut self, payload: &[u8], room: &mut [u8]) -> Option<(usize, usize)> {
        match &mut self.0 {
            Inflate::Zlib(stream) => {
                let (taken, given) = (stream.total_in(), stream.total_out());
                stream.decompress(payload, room, FlushDecompress::Sync).ok()?;
                Some(((stream.total_in() - taken) as usize, (stream.total_out() - given) as usize))
            }
            Inflate::Zstd(decoder) => {
                let mut from = InBuffer::around(payload);
                let mut to = OutBuffer::around(room);
                decoder.run(&mut from, &mut to).ok()?;
                Some((from.pos(), to.pos()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn compressions() -> [PageCompression; 5] {
        [
            PageCompression::Zlib(0),
            PageCompression::Zlib(1),
            PageCompression::Zlib(9),
            PageCompression::Zstd(1),
            PageCompression::Zstd(20),
        ]
    }

    #[test]
    fn packings_have_names() {
        for (text, compression) in [
            ("none", PageCompression::Plain),
            ("zlib", PageCompression::Zlib(1)),
            ("zlib:9", PageCompression::Zlib(9)),
            ("zstd:20", PageCompression::Zstd(20)),
        ] {
            assert_eq!(text.parse(), Ok(compression));
            assert_eq!(compression.to_string().parse(), Ok(compression));
        }
        for wrong in ["", "lz4", "none:1", "zlib:10", "zstd:21", "zstd:", "zlib:-1"] {
            assert!(wrong.parse::<PageCompression>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn s47_one_stream_goes_through_all_packets_and_gives_exactly_their_pages() {
        for compression in compressions() {
            let mut deflater = PacketDeflater::new(compression).unwrap();
            let mut packet = |bytes: &[u8]| {
                let mut out = Vec::new();
                deflater.deflate(bytes, &mut out).unwrap();
                out
            };
            let (first, second) = (packet(&[1; 8192]), packet(&[2; 4096]));
            let inflater = || PacketInflater::new(compression.method()).unwrap().unwrap();
            let mut out = vec![0; 8192];
            let mut whole = inflater();
            assert_eq!(whole.inflate(&first, &mut out), Ok(()), "{compression:?}");
            assert!(out.iter().all(|byte| *byte == 1));
            assert_eq!(whole.inflate(&second, &mut out[..4096]), Ok(()), "{compression:?}");
            assert!(out[..4096].iter().all(|byte| *byte == 2));
            for (what, len) in [("too much", 8191), ("too little", 8193)] {
                assert!(inflater().inflate(&first, &mut vec![0; len]).is_err(), "{compression:?}: {what}");
            }
            assert!(inflater().inflate(&second, &mut out).is_err(), "{compression:?}: the header is missing");
            assert!(inflater().inflate(&[], &mut out).is_err(), "{compression:?}: nothing");
        }
    }

    /// A complete packet of incompressible data: its end must not wait in the compressor for the next packet.
    #[test]
    fn s47_each_packet_gives_all_its_pages_by_itself() {
        let mut noise = 1u64;
        let mut bytes = vec![0; 512 << 10];
        for compression in compressions() {
            let mut deflater = PacketDeflater::new(compression).unwrap();
            let mut inflater = PacketInflater::new(compression.method()).unwrap().unwrap();
            for packet in 0..4 {
                bytes.iter_mut().for_each(|byte| {
                    noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    *byte = (noise >> 56) as u8;
                });
                let (mut packed, mut out) = (Vec::new(), vec![0; bytes.len()]);
                deflater.deflate(&bytes, &mut packed).unwrap();
                assert_eq!(inflater.inflate(&packed, &mut out), Ok(()), "{compression:?}, packet {packet}");
                assert!(out == bytes, "{compression:?}, packet {packet}");
            }
        }
    }

    /// A payload that would expand to gigabytes needs no more memory than its packet's pages.
    #[test]
    fn s48_a_bomb_fills_no_more_than_its_pages() {
        for compression in [PageCompression::Zlib(9), PageCompression::Zstd(20)] {
            let mut bomb = Vec::new();
            PacketDeflater::new(compression).unwrap().deflate(&vec![0; 16 << 20], &mut bomb).unwrap();
            assert!(bomb.len() < 1 << 20, "{compression:?}: {} bytes", bomb.len());
            let mut out = vec![1; 512 << 10];
            let refused =
                PacketInflater::new(compression.method()).unwrap().unwrap().inflate(&bomb, &mut out);
            assert_eq!(
                refused,
                Err(Fault::Multifd("the payload of a packet does not give exactly its pages")),
                "{compression:?}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn packets_of_any_bytes_come_out_as_they_went_in(
            packets in prop::collection::vec((any::<u8>(), 1usize..5, any::<bool>()), 1..5),
            level in 0u8..10,
        ) {
            for compression in [PageCompression::Zlib(level), PageCompression::Zstd(level)] {
                let mut deflater = PacketDeflater::new(compression).unwrap();
                let mut inflater = PacketInflater::new(compression.method()).unwrap().unwrap();
                for (seed, pages, noisy) in &packets {
                    let mut noise = u64::from(*seed) + 1;
                    let mut byte = |at: usize| {
                        noise ^= noise << 13;
                        noise ^= noise >> 7;
                        noise ^= noise << 17;
                        if *noisy { noise as u8 } else { *seed ^ (at / 100) as u8 }
                    };
                    let bytes: Vec<u8> = (0..pages * 4096 * 8).map(&mut byte).collect();
                    let (mut packed, mut out) = (Vec::new(), vec![0; bytes.len()]);
                    deflater.deflate(&bytes, &mut packed).unwrap();
                    prop_assert_eq!(inflater.inflate(&packed, &mut out), Ok(()));
                    prop_assert!(out == bytes);
                }
            }
        }

        #[test]
        fn any_payload_is_an_answer(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            for method in [Method::Zlib, Method::Zstd] {
                let _ = PacketInflater::new(method).unwrap().unwrap().inflate(&bytes, &mut [0; 4096]);
            }
        }
    }
}
