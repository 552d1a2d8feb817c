//! Errors in bytes from a peer or a file.
//!
//! Two errors that a caller must never confuse: *more bytes are needed* ([`DecodeError::Truncated`]) and *no further
//! byte can help* ([`DecodeError::Corrupt`]). The second gives the offset of the first invalid byte.

use crate::error::Remedy;
use crate::units::BlockOffset;

/// Why bytes did not decode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes so far are fine, but the value is not complete. Nothing was taken: call again with at least `needed`
    /// bytes, counted from the same start. More input can resolve no other error.
    #[error("the stream ends inside a value: {have} bytes are here, {needed} are needed")]
    Truncated {
        /// Bytes without which decoding cannot go further, counted from the start of the input.
        needed: usize,
        /// Bytes that were given.
        have: usize,
    },
    /// The bytes are wrong, and no further byte can make them right.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
}

/// An error in a stream and its offset.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at} ({at:#x}) of the stream: {fault}")]
pub struct Corrupt {
    /// Offset of the first offending byte, from the start of the input of the function that reports it;
    /// [`DecodeError::based`] turns it into an offset from the start of the stream.
    pub at: u64,
    /// The fault.
    pub fault: Fault,
}

impl DecodeError {
    /// A fault `at` bytes from the start of the input.
    pub(crate) fn corrupt(at: usize, fault: Fault) -> Self {
        Self::Corrupt(Corrupt { at: at as u64, fault })
    }

    /// Moves the offset of a fault by `base`, the position in the stream at which the input began.
    #[must_use]
    pub fn based(self, base: u64) -> Self {
        match self {
            Self::Corrupt(Corrupt { at, fault }) => {
                Self::Corrupt(Corrupt { at: at.saturating_add(base), fault })
            }
            truncated @ Self::Truncated { .. } => truncated,
        }
    }

    /// The same for an input that began `by` bytes earlier.
    pub(crate) fn shifted(self, by: usize) -> Self {
        match self {
            Self::Truncated { needed, have } => {
                Self::Truncated { needed: needed.saturating_add(by), have: have.saturating_add(by) }
            }
            corrupt @ Self::Corrupt(_) => corrupt.based(by as u64),
        }
    }

    /// The remedy, if a setting helps.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::Corrupt(Corrupt { fault: Fault::TooMuchRam { .. }, .. }) => Some(Remedy::RaiseRamLimit),
            Self::Corrupt(Corrupt { fault: Fault::TlsAlert, .. }) => Some(Remedy::AlignTls),
            _ => None,
        }
    }

    /// True if more input may resolve it.
    pub fn is_truncated(&self) -> bool {
        matches!(self, Self::Truncated { .. })
    }
}

/// What is wrong with a stream. The fields hold the received values.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// The first four bytes are not `QEVM`.
    #[error("this is no migration stream: the magic is {found:#010x}, not \"QEVM\"")]
    Magic {
        /// The four bytes, big endian.
        found: u32,
    },
    /// Another stream version than 3.
    #[error("stream version {found} is not supported, only version 3 is")]
    StreamVersion {
        /// The version word.
        found: u32,
    },
    /// The configuration section does not follow the header.
    #[error("the configuration section is missing: byte {found:#04x} stands where 0x07 is due")]
    NoConfiguration {
        /// The byte in its place.
        found: u8,
    },
    /// A length-prefixed name is empty or no UTF-8.
    #[error("the {what} is empty or no text")]
    Name {
        /// The named item.
        what: &'static str,
    },
    /// A subsection of the configuration that is not known, or comes twice.
    #[error("configuration subsection {name:?} is unknown or comes twice")]
    Subsection {
        /// Its name.
        name: Box<str>,
    },
    /// A migration capability whose effect on the stream is not known.
    #[error(
        "the source has capability {name:?} on, which is not supported here: switch it off at the source"
    )]
    Capability {
        /// Its name.
        name: Box<str>,
    },
    /// A target page size that is no page size, or not the expected one.
    #[error("the source's target page has {found} bytes, {expected} are expected")]
    TargetPage {
        /// As announced, in bytes.
        found: u64,
        /// As configured, in bytes.
        expected: u64,
    },
    /// A version word of a section or subsection that this code does not read.
    #[error("{name:?} has version {found}, only version {supported} is supported")]
    Version {
        /// The section or subsection.
        name: Box<str>,
        /// Its version.
        found: u32,
        /// The version that is read.
        supported: u32,
    },
    /// A byte that begins no item, or an item that is not allowed here.
    #[error("byte {found:#04x} begins nothing that is legal here")]
    Item {
        /// The type byte.
        found: u8,
    },
    /// The footer of a section is missing.
    #[error("the footer of section {id} is missing: byte {found:#04x} stands where 0x7e is due")]
    NoFooter {
        /// Id of the section.
        id: u32,
        /// The byte in its place.
        found: u8,
    },
    /// The footer of a section names another section.
    #[error("the footer of section {id} names section {found}")]
    Footer {
        /// Id of the section.
        id: u32,
        /// Id in the footer.
        found: u32,
    },
    /// A section continues that never started.
    #[error("section {id} continues but never started")]
    UnknownSection {
        /// Its id.
        id: u32,
    },
    /// Two open sections share an id.
    #[error("section id {id} is in use already")]
    SectionIdTaken {
        /// The id.
        id: u32,
    },
    /// A section of unknown length, since its content is not understood.
    #[error(
        "section {idstr:?} (instance {instance}) has a format of its own and no length, so the stream cannot be \
         followed past it: remove the device or switch the feature off at the source"
    )]
    UnknownIterable {
        /// Its name.
        idstr: Box<str>,
        /// Its instance.
        instance: u32,
    },
    /// A command number that does not exist.
    #[error("command {number} does not exist")]
    Command {
        /// The number.
        number: u16,
    },
    /// A command or return-path message with a wrong length or malformed content.
    #[error("{what} has a malformed body of {len} bytes")]
    Body {
        /// Which command or message.
        what: &'static str,
        /// Its announced length.
        len: u16,
    },
    /// The peer answers with TLS, but this end does not use TLS.
    #[error("the peer answers with a TLS alert, and nothing is encrypted here; {}", Remedy::AlignTls)]
    TlsAlert,
    /// A message type of the return path that does not exist.
    #[error("return-path message {number} does not exist")]
    Message {
        /// The type word.
        number: u16,
    },
    /// A message of COLO that does not exist.
    #[error("message {number:#x} of COLO does not exist")]
    ColoMessage {
        /// The word.
        number: u32,
    },
    /// A valid item at a moment at which it is not allowed.
    #[error("{what} is not legal here: {why}")]
    OutOfOrder {
        /// The received item.
        what: &'static str,
        /// Why not now.
        why: &'static str,
    },
    /// A RAM record whose flags name no kind, or several.
    #[error("the flags {flags:#x} of a RAM record name no kind of record")]
    RecordFlags {
        /// Word below the page size, without CONTINUE.
        flags: u64,
    },
    /// A record for the current block, but there is none.
    #[error("a RAM record continues the current block, but no block was named before")]
    NoCurrentBlock,
    /// A block name that was not announced.
    #[error("block {name:?} was not announced")]
    UnknownBlock {
        /// The name.
        name: Box<str>,
    },
    /// A page outside its block.
    #[error("block {block:?} has {used_length} bytes, the page at {offset} lies outside")]
    OutsideBlock {
        /// Name of the block.
        block: Box<str>,
        /// Offset of the page.
        offset: BlockOffset,
        /// Used length of the block in bytes.
        used_length: u64,
    },
    /// A zero page record with a fill byte other than zero.
    #[error("a zero page record carries the fill byte {byte:#04x}")]
    FillByte {
        /// The byte.
        byte: u8,
    },
    /// A block list whose lengths do not add up.
    #[error("block {name:?} announces {length} bytes: {why}")]
    BlockLength {
        /// Name of the block.
        name: Box<str>,
        /// Its announced length in bytes.
        length: u64,
        /// The problem.
        why: &'static str,
    },
    /// A block that is announced twice.
    #[error("block {name:?} is announced twice")]
    DuplicateBlock {
        /// Its name.
        name: Box<str>,
    },
    /// A second block list that is not the first.
    #[error("a second block list differs from the first")]
    BlockListChanged,
    /// An XBZRLE page that breaks the encoding's rules.
    #[error("XBZRLE page: {0}")]
    Xbzrle(super::xbzrle::XbzrleFault),
    /// A compressed page that does not give exactly one page.
    #[error("a compressed page does not inflate to exactly {page_bytes} bytes")]
    Inflate {
        /// The page size.
        page_bytes: u64,
    },
    /// The guest has more RAM than the caller's limit.
    #[error("the source announces {announced} bytes of RAM, the limit is {limit}; {}", Remedy::RaiseRamLimit)]
    TooMuchRam {
        /// All blocks together, in bytes.
        announced: u64,
        /// The limit, in bytes.
        limit: u64,
    },
    /// A number above its limit.
    #[error("{what} is {value}, the limit is {limit}")]
    Limit {
        /// What the number counts.
        what: &'static str,
        /// As received.
        value: u64,
        /// The highest accepted.
        limit: u64,
    },
    /// A part of the device state or of its description that contradicts the other.
    #[error("device state: {0}")]
    Device(&'static str),
    /// A block of a mapped-ram file whose header or bitmap is impossible.
    #[error(
        "mapped-ram, block {name:?}: {field} is {value:#x}: {why}; the file is damaged, save the guest again"
    )]
    MappedRam {
        /// Name of the block.
        name: Box<str>,
        /// Which field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// Why that can't be.
        why: &'static str,
    },
    /// A file that leaves shared blocks out in a way that cannot be read.
    #[error(
        "under x-ignore-shared this mapped-ram file leaves no block out: QEMU 10.2 and older write it in a form \
        that can't be read; save the guest without x-ignore-shared, or by QEMU 11.0 or newer"
    )]
    MappedRamShared,
    /// A multifd packet or channel that breaks the rules.
    #[error("multifd: {0}")]
    Multifd(&'static str),
    /// The pages of a multifd packet are compressed in another way than this end expects.
    #[error(
        "multifd: the source compresses pages by {theirs}, and this end expects {ours}: set multifd-compression alike"
    )]
    OtherCompression {
        /// As in the packet.
        theirs: &'static str,
        /// As configured here.
        ours: &'static str,
    },
}

impl From<super::xbzrle::XbzrleFault> for Fault {
    fn from(fault: super::xbzrle::XbzrleFault) -> Self {
        Self::Xbzrle(fault)
    }
}
