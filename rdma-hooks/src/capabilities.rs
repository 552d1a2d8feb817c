//! The private data of the connection handshake.
//!
//! The first 8 bytes are QEMU's: a version (1) and flags, of which only bit 0 (pin-all) is defined. A destination
//! answers with those requested flags that it supports. Bit 31 is an addition of this crate. A QEMU masks it out and
//! reads only the first 8 bytes, so only this crate reads the [`Extension`] after them. Only a reply with bit 31 set
//! turns the extension on.
//!
//! The fabric pads received private data (to 56 bytes in a request, 196 in a reply, on InfiniBand and RoCE).

/// Version in the first four bytes; no other version exists.
pub const VERSION: u32 = 1;
/// Bytes of QEMU's struct.
pub const BASE_BYTES: usize = 8;
/// Bytes sent with the extension: the maximum that a connection request can carry.
pub const EXTENDED_BYTES: usize = BASE_BYTES + Extension::BYTES;

const PIN_ALL: u32 = 1 << 0;
const EXTENDED: u32 = 1 << 31;
const MAGIC: u32 = u32::from_be_bytes(*b"RHK1");

const _: () = assert!(EXTENDED_BYTES == 56, "a connection request carries at most 56 bytes");

/// Why private data of a peer is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CapabilityError {
    /// Not even QEMU's struct.
    #[error(
        "private data of {have} bytes is shorter than the capability struct (8); the peer is no migration peer"
    )]
    Short {
        /// Bytes received.
        have: usize,
    },
    /// Another protocol version.
    #[error("peer speaks version {version} of the rdma: protocol, this end only version 1")]
    Version {
        /// Version of the peer.
        version: u32,
    },
    /// The reply grants a capability that was not requested.
    #[error("peer granted capability bits {flags:#x}, asked were {asked:#x}")]
    NotAsked {
        /// Flags in the reply.
        flags: u32,
        /// Flags in the request.
        asked: u32,
    },
}

/// Identifies one migration and binds its connections to each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MigrationId(pub [u8; 16]);

/// Which of a migration's connections this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Control messages, byte stream, and (with one queue pair) the writes.
    Main,
    /// The return path, opened by the source.
    ReturnPath,
    /// An additional queue pair for writes, counted from 1.
    Data(u16),
    /// A queue pair on which the destination posts READs, counted from 0.
    Read(u16),
}

/// Messages beyond QEMU's protocol. Off towards a QEMU; on if both ends support them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// One REGISTER REQUEST asks for many keys. A QEMU answers only the first of them.
    pub key_batches: bool,
    /// Zero ranges travel as lists ([`Kind::ZeroRuns`](crate::control::Kind::ZeroRuns)).
    pub zero_runs: bool,
    /// In an open round the source sends [`Kind::Alive`](crate::control::Kind::Alive) if it has sent nothing else for a
    /// second. The destination may then treat silence as the end of the source.
    pub keepalives: bool,
    /// After a switch to postcopy the destination reads the missing pages itself. The source opens
    /// [`READ_QUEUES`](crate::hooks::READ_QUEUES) more queue pairs for it.
    pub reads: bool,
}

impl Features {
    /// QEMU's protocol and no more.
    pub const NONE: Self = Self { key_batches: false, zero_runs: false, keepalives: false, reads: false };
    /// All that this version knows.
    pub const ALL: Self = Self { key_batches: true, zero_runs: true, keepalives: true, reads: true };

    fn bits(self) -> u16 {
        let flags = [self.key_batches, self.zero_runs, self.keepalives, self.reads];
        flags.iter().rev().fold(0, |bits, flag| bits << 1 | u16::from(*flag))
    }

    /// Ignores bits of later versions.
    fn from_bits(bits: u16) -> Self {
        let [key_batches, zero_runs, keepalives, reads] = [1, 2, 4, 8].map(|bit| bits & bit != 0);
        Self { key_batches, zero_runs, keepalives, reads }
    }

    fn and(self, other: Self) -> Self {
        Self::from_bits(self.bits() & other.bits())
    }
}

impl Default for Features {
    fn default() -> Self {
        Self::ALL
    }
}

/// The role of the first queue pair for READs on the wire.
const FIRST_READ: u16 = 0xfff0;

/// This crate's extension, after QEMU's struct. Fields that a later version adds read as zero here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Which connection this is.
    pub role: Role,
    /// Additional queue pairs: wanted in a request, granted in a reply.
    pub data_queues: u16,
    /// Maximum number of READY credits that the byte stream's receiver may have outstanding; 1 is QEMU's protocol.
    pub window: u16,
    /// Messages beyond QEMU's: requested in a request, granted in a reply.
    pub features: Features,
    /// The migration this connection belongs to.
    pub migration: MigrationId,
}

impl Extension {
    const BYTES: usize = 48;

    fn write(&self, out: &mut Vec<u8>) {
        let role = match self.role {
            Role::Main => 0,
            Role::ReturnPath => u16::MAX,
            Role::Data(index) => index,
            Role::Read(index) => FIRST_READ + index,
        };
        out.extend_from_slice(&MAGIC.to_be_bytes());
        for half in [role, self.data_queues, self.window, self.features.bits()] {
            out.extend_from_slice(&half.to_be_bytes());
        }
        out.extend_from_slice(&self.migration.0);
        out.resize(out.len() + 20, 0);
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let half = |at: usize| bytes.get(at..at + 2)?.try_into().ok().map(u16::from_be_bytes);
        if bytes.get(..4)? != MAGIC.to_be_bytes() {
            return None;
        }
        let role = match half(4)? {
            0 => Role::Main,
            u16::MAX => Role::ReturnPath,
            index if index >= FIRST_READ => Role::Read(index - FIRST_READ),
            index => Role::Data(index),
        };
        let migration = MigrationId(bytes.get(12..28)?.try_into().ok()?);
        let features = Features::from_bits(half(10)?);
        Some(Self { role, data_queues: half(6)?, window: half(8)?.max(1), features, migration })
    }
}

/// One end's private data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// Register every block as a whole before the first write.
    pub pin_all: bool,
    /// The extension beyond QEMU's struct.
    pub extension: Option<Extension>,
}

impl Capabilities {
    fn flags(&self) -> u32 {
        let pin_all = if self.pin_all { PIN_ALL } else { 0 };
        pin_all | if self.extension.is_some() { EXTENDED } else { 0 }
    }

    /// The bytes to put into the connection's private data: 8, or 56 with the extension.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(EXTENDED_BYTES);
        out.extend_from_slice(&VERSION.to_be_bytes());
        out.extend_from_slice(&self.flags().to_be_bytes());
        if let Some(extension) = &self.extension {
            extension.write(&mut out);
        }
        out
    }

    /// Reads a source's request. Unknown bits are ignored; the extension is used only if both its bit and its magic are
    /// there.
    ///
    /// # Errors
    ///
    /// [`CapabilityError::Short`] and [`CapabilityError::Version`]: the request is to be rejected.
    pub fn decode(private_data: &[u8]) -> Result<Self, CapabilityError> {
        let word = |at: usize| private_data.get(at..at + 4)?.try_into().ok().map(u32::from_be_bytes);
        let (Some(version), Some(flags)) = (word(0), word(4)) else {
            return Err(CapabilityError::Short { have: private_data.len() });
        };
        if version != VERSION {
            return Err(CapabilityError::Version { version });
        }
        let extension =
            if flags & EXTENDED != 0 { Extension::read(&private_data[BASE_BYTES..]) } else { None };
        Ok(Self { pin_all: flags & PIN_ALL != 0, extension })
    }

    /// A destination's answer to `self`: pin-all as requested (a QEMU 7.2 source fails if it is not granted), and the
    /// extension limited to what `able` offers. It grants no bit that was not requested.
    pub fn grant(&self, able: Option<&Extension>) -> Self {
        let extension = match (self.extension, able) {
            (Some(asked), Some(able)) => Some(Extension {
                data_queues: asked.data_queues.min(able.data_queues),
                window: asked.window.min(able.window).max(1),
                features: asked.features.and(able.features),
                ..asked
            }),
            _ => None,
        };
        Self { pin_all: self.pin_all, extension }
    }

    /// Reads a destination's reply to `self`. A capability that is missing from it stays off.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode), and [`CapabilityError::NotAsked`] for a bit or a number above the request's.
    pub fn confirm(&self, private_data: &[u8]) -> Result<Self, CapabilityError> {
        let granted = Self::decode(private_data)?;
        let more = match (granted.extension, self.extension) {
            (Some(got), Some(asked)) => {
                got.data_queues > asked.data_queues
                    || got.window > asked.window
                    || got.features.and(asked.features) != got.features
            }
            (Some(_), None) => true,
            (None, _) => false,
        };
        if more || (granted.pin_all && !self.pin_all) {
            return Err(CapabilityError::NotAsked { flags: granted.flags(), asked: self.flags() });
        }
        Ok(granted)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::*;

    fn padded(bytes: &[u8], len: usize) -> Vec<u8> {
        let mut bytes = bytes.to_vec();
        bytes.resize(len, 0);
        bytes
    }

    fn offer() -> Extension {
        let (features, migration) = (Features::ALL, MigrationId([7; 16]));
        Extension { role: Role::Main, data_queues: 3, window: 8, features, migration }
    }

    #[test]
    fn r03_version_one_and_the_pin_all_bit() {
        assert_eq!(Capabilities::default().encode(), [0, 0, 0, 1, 0, 0, 0, 0]);
        let pin_all = Capabilities { pin_all: true, extension: None };
        assert_eq!(pin_all.encode(), [0, 0, 0, 1, 0, 0, 0, 1]);
    }

    #[test]
    fn r04_requests_are_taken_at_any_length_from_8_and_refused_below_or_with_another_version() {
        for len in [8, 9, 56, 196] {
            let request = padded(&[0, 0, 0, 1, 0, 0, 0, 1], len);
            assert!(Capabilities::decode(&request).unwrap().pin_all, "{len}");
        }
        assert_eq!(Capabilities::decode(&[0; 7]), Err(CapabilityError::Short { have: 7 }));
        assert_eq!(Capabilities::decode(&[0; 8]), Err(CapabilityError::Version { version: 0 }));
        assert_eq!(
            Capabilities::decode(&[0, 0, 0, 2, 0, 0, 0, 0]),
            Err(CapabilityError::Version { version: 2 })
        );
    }

    #[test]
    fn r05_r55_the_grant_has_only_bits_that_were_asked_for_and_are_known() {
        for (flags, granted) in [(0u32, 0u32), (1, 1), (0xff00, 0), (0x8000_0001, 1), (u32::MAX, 1)] {
            let request = [VERSION.to_be_bytes(), flags.to_be_bytes()].concat();
            let reply = Capabilities::decode(&padded(&request, 56)).unwrap().grant(Some(&offer()));
            assert_eq!(reply.encode()[4..8], granted.to_be_bytes(), "{flags:#x}");
        }
    }

    #[test]
    fn r06_r07_a_reply_without_the_bit_turns_pin_all_off() {
        let asked = Capabilities { pin_all: true, extension: Some(offer()) };
        let qemu_reply = padded(&[0, 0, 0, 1, 0, 0, 0, 0], 196);
        assert_eq!(asked.confirm(&qemu_reply).unwrap(), Capabilities::default());
    }

    #[test]
    fn r55_the_extension_survives_both_ways_and_is_cut_to_the_smaller_ability() {
        let asked = Capabilities { pin_all: false, extension: Some(offer()) };
        let request = asked.encode();
        assert_eq!(request.len(), EXTENDED_BYTES);
        let features = Features { zero_runs: false, ..Features::ALL };
        let able = Extension { data_queues: 1, window: 20, features, ..offer() };
        let seen = Capabilities::decode(&request).unwrap();
        assert_eq!(seen, asked);
        let granted = asked.confirm(&padded(&seen.grant(Some(&able)).encode(), 196)).unwrap();
        assert_eq!(granted.extension, Some(Extension { data_queues: 1, window: 8, features, ..offer() }));
        assert_eq!(asked.confirm(&seen.grant(None).encode()).unwrap(), Capabilities::default());
    }

    #[test]
    fn a_grant_beyond_the_request_is_refused() {
        let plain = Capabilities::default();
        let pinned = Capabilities { pin_all: true, extension: None };
        assert!(matches!(plain.confirm(&pinned.encode()), Err(CapabilityError::NotAsked { .. })));
        let more = Capabilities { pin_all: false, extension: Some(Extension { data_queues: 9, ..offer() }) };
        let asked = Capabilities { pin_all: false, extension: Some(offer()) };
        assert!(matches!(asked.confirm(&more.encode()), Err(CapabilityError::NotAsked { .. })));
        let plainer = Capabilities {
            pin_all: false,
            extension: Some(Extension { features: Features::NONE, ..offer() }),
        };
        assert!(matches!(plainer.confirm(&asked.encode()), Err(CapabilityError::NotAsked { .. })));
        assert!(matches!(plain.confirm(&more.encode()), Err(CapabilityError::NotAsked { .. })));
    }
}
