//! How the ends verify the migrated guest: the option, and its result.

use clap::ValueEnum;
use ramwire::session::{MemoryCheck, Verify};
use serde_json::{Value, json};

/// The option's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum VerifyBy {
    Off,
    Fast,
    Full,
}

impl From<VerifyBy> for Verify {
    fn from(by: VerifyBy) -> Self {
        match by {
            VerifyBy::Off => Self::Off,
            VerifyBy::Fast => Self::Fast,
            VerifyBy::Full => Self::Full,
        }
    }
}

/// The option's word.
pub(super) fn word_of(verify: Verify) -> &'static str {
    match verify {
        Verify::Off => "off",
        Verify::Fast => "fast",
        Verify::Full => "full",
    }
}

/// What the source has found in its memory.
pub(super) fn in_json(check: Option<&MemoryCheck>) -> Value {
    let result = match check {
        None => "not asked",
        Some(MemoryCheck::Equal { .. }) => "equal",
        Some(MemoryCheck::Differs { .. }) => "differs",
        Some(_) => "not made",
    };
    let (pages, block, from, to) = match check {
        Some(MemoryCheck::Equal { pages }) => (*pages, None, 0, 0),
        Some(MemoryCheck::Differs { block, from, to, pages }) => (*pages, Some(block.as_str()), from.0, *to),
        _ => (0, None, 0, 0),
    };
    let why = if let Some(MemoryCheck::NotMade { why }) = check { Some(why) } else { None };
    json!({ "result": result, "pages": pages, "block": block, "from": from, "to": to, "why": why })
}
