//! RESUME: another connection of a migration whose connection was lost.

use super::{DecodeError, Reader, Writer};

/// Who connects again, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The migration.
    pub migration_id: [u8; 16],
    /// The destination's secret, as its HELLO told it.
    pub secret: [u8; 16],
    /// Grows with each connection of the migration; the first one after a loss has 1. An older one that arrives late is of no use.
    pub attempt: u32,
    /// COMMIT was sent: the guest is the destination's, and its start is asked for.
    pub committed: bool,
}

impl Resume {
    /// Bytes of the body.
    pub const LEN: usize = 37;

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        writer.bytes(&self.migration_id).bytes(&self.secret).be32(self.attempt).u8(u8::from(self.committed));
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Option<Self>, DecodeError> {
        let (migration_id, secret, attempt) = (reader.array()?, reader.array()?, reader.be32()?);
        let committed = match reader.u8()? {
            0 => false,
            1 => true,
            _ => return Ok(None),
        };
        Ok(Some(Self { migration_id, secret, attempt, committed }))
    }
}
