//! RESUME: another connection of a migration whose connection was lost.

use super::{Reader, Writer};
use crate::stream::error::DecodeError;

/// Who connects again, and what for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resume {
    /// The migration.
    pub migration_id: [u8; 16],
    /// The destination's secret, as its HELLO told it.
    pub secret: [u8; 16],
    /// Grows with each connection of the migration; the first one after a loss has 1. An older one that arrives late is of no use.
    pub attempt: u32,
    /// What for.
    pub purpose: Purpose,
}

/// What a source connects again for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To go on: the guest runs at the source.
    GoOn,
    /// COMMIT was sent: the guest is the destination's, and its start is asked for.
    AskForGuest,
    /// To end: the guest runs on at the source, and no other connection follows. Only before COMMIT.
    GiveUp,
}

impl Resume {
    /// Bytes of the body.
    pub const LEN: usize = 37;

    pub(super) fn encode(&self, writer: &mut Writer<'_>) {
        writer.bytes(&self.migration_id).bytes(&self.secret).be32(self.attempt).u8(match self.purpose {
            Purpose::GoOn => 0,
            Purpose::AskForGuest => 1,
            Purpose::GiveUp => 2,
        });
    }

    pub(super) fn decode(reader: &mut Reader<'_>) -> Result<Option<Self>, DecodeError> {
        let (migration_id, secret, attempt) = (reader.array()?, reader.array()?, reader.be32()?);
        let purpose = match reader.u8()? {
            0 => Purpose::GoOn,
            1 => Purpose::AskForGuest,
            2 => Purpose::GiveUp,
            _ => return Ok(None),
        };
        Ok(Some(Self { migration_id, secret, attempt, purpose }))
    }
}
