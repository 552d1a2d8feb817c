//! HELLO: what each end can do, and wants.

use super::{MAX_VERSION, MIN_VERSION};
use crate::stream::error::DecodeError;
use crate::stream::reader::Reader;
use crate::stream::writer::Writer;

/// How an end describes itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version it supports.
    pub min_version: u16,
    /// Newest version it supports; in the answer: the one that both use from here on.
    pub max_version: u16,
    /// Names this migration on later channels.
    pub migration_id: [u8; 16],
    /// A digest of RAM and state is compared before READY.
    pub digest: bool,
    /// Requested pages of a postcopy come on a connection of their own.
    pub urgent: bool,
    /// Memory is passed as descriptors: the source may, the destination takes it.
    pub passes: bool,
    /// Fingerprints of pages are compared after each round, and the source's memory once the guest runs.
    pub fingerprints: bool,
    /// Pages of a postcopy that nobody waits for come on the page channels.
    pub spread: bool,
    /// All memory was passed ahead of the stream: the source gave it, the destination has it.
    pub has_memory: bool,
    /// A lost connection may be followed by another, on which the other end proves by this that it is the same.
    pub secret: Option<[u8; 16]>,
}

impl Hello {
    /// The HELLO of this version.
    pub fn ours(migration_id: [u8; 16], digest: bool) -> Self {
        Self {
            min_version: MIN_VERSION,
            max_version: MAX_VERSION,
            migration_id,
            digest,
            urgent: false,
            passes: false,
            fingerprints: false,
            spread: false,
            has_memory: false,
            secret: None,
        }
    }

    /// The newest version that both ends support.
    pub fn common_version(&self) -> Option<u16> {
        let version = self.max_version.min(MAX_VERSION);
        (version >= self.min_version && version >= MIN_VERSION).then_some(version)
    }

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        writer.be16(self.min_version).be16(self.max_version).bytes(&self.migration_id);
        let flags = [
            self.digest,
            self.urgent,
            self.passes,
            self.fingerprints,
            self.spread,
            self.secret.is_some(),
            self.has_memory,
        ];
        writer.u8(flags.iter().rev().fold(0, |bits, flag| bits << 1 | u8::from(*flag)));
        writer.bytes(self.secret.as_ref().map_or(&[][..], |secret| secret.as_slice()));
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Self, DecodeError> {
        let (min_version, max_version, migration_id) = (reader.be16()?, reader.be16()?, reader.array()?);
        let flags = reader.u8()?;
        let [digest, urgent, passes, fingerprints, spread, resumes, has_memory] =
            [1, 2, 4, 8, 16, 32, 64].map(|bit| flags & bit != 0);
        let secret = if resumes { Some(reader.array()?) } else { None };
        Ok(Self {
            min_version,
            max_version,
            migration_id,
            digest,
            urgent,
            passes,
            fingerprints,
            spread,
            has_memory,
            secret,
        })
    }
}
