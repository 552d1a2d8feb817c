//! The messages of a QEMU before its migration in mode cpr-transfer: the names of the descriptors that it passes.
//!
//! ```text
//! be32 "QCPR"  be32 1
//! each descriptor:  u8 1  be32 length  name and a zero byte  be32 id  u8 0x20, sent with the descriptor itself
//! u8 0
//! QEMU 10.1 and later:  u8 5  u8 21 "CprState/vfio devices"  be32 1  u8 0
//! ```
//!
//! The stream ends there. The newest name comes first; a QEMU that reads them finds each by its name, whatever their
//! order. Memory has the name of its RAM block and the id 0.
//!
//! A QEMU 10.1 and later reads a state without the part for devices as one without devices, and a QEMU 10.0 reads no
//! state with it. So it is never written here.

use super::super::reader::Reader;
use crate::ram::BlockName;

/// `QCPR`.
const MAGIC: u32 = 0x5143_5052;
/// What it begins with.
pub(crate) const CPR_BEGIN: [u8; 4] = MAGIC.to_be_bytes();
const VERSION: u32 = 1;
/// The byte that each descriptor is sent with.
pub const WITH_DESCRIPTOR: u8 = 0x20;
const SUBSECTION: u8 = 5;
const DEVICES: &[u8] = b"CprState/vfio devices";

/// Maximum number of bytes that are read of a whole state.
pub const MAX_CPR_STATE: usize = 64 << 10;

/// Why bytes are no such state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CprStateError {
    /// It begins otherwise.
    #[error(
        "it does not begin as a QEMU's cpr channel does: see that the address is given as the channel of type cpr"
    )]
    NoState,
    /// A version that is not known.
    #[error("it has version {found}, and version {VERSION} is known")]
    Version {
        /// The version.
        found: u32,
    },
    /// It ends too early.
    #[error("it ends after {at} bytes, in the middle")]
    Truncated {
        /// Its length.
        at: usize,
    },
    /// Bytes that mean nothing.
    #[error("byte {at} of it has no meaning")]
    Malformed {
        /// Its position.
        at: usize,
    },
    /// A descriptor that is no memory.
    #[error("it passes the descriptor {name:?}, which is of a device: take that device off the guest first")]
    Device {
        /// Its name.
        name: String,
    },
}

/// A state that passes memory of these names: one part before each descriptor, and the last one. A descriptor is sent
/// with the byte [`WITH_DESCRIPTOR`] between two parts.
pub fn encode_cpr_state<'a>(names: impl Iterator<Item = &'a BlockName>) -> Vec<Vec<u8>> {
    let mut parts = Vec::new();
    let mut part = [MAGIC.to_be_bytes(), VERSION.to_be_bytes()].concat();
    for name in names {
        part.push(1);
        put_name(name, &mut part);
        parts.push(std::mem::take(&mut part));
    }
    part.push(0);
    parts.push(part);
    parts
}

fn put_name(name: &BlockName, out: &mut Vec<u8>) {
    let text = name.as_str();
    out.extend_from_slice(&(text.len() as u32 + 1).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
    // The end of the text, and the id.
    out.extend_from_slice(&[0; 5]);
}

/// The names of the descriptors, in the order in which they come.
///
/// # Errors
/// [`CprStateError`]; devices that are passed are refused by name.
pub fn decode_cpr_state(bytes: &[u8]) -> Result<Vec<BlockName>, CprStateError> {
    let mut reader = Reader::new(bytes);
    let names = decode(&mut reader);
    let at = reader.position();
    match names.map_err(|_| CprStateError::Truncated { at: bytes.len() })? {
        Ok(_) if !reader.rest().is_empty() => Err(CprStateError::Malformed { at }),
        named => named,
    }
}

type Decoded<T> = Result<T, crate::stream::DecodeError>;

fn decode(reader: &mut Reader<'_>) -> Decoded<Result<Vec<BlockName>, CprStateError>> {
    if reader.be32()? != MAGIC {
        return Ok(Err(CprStateError::NoState));
    }
    let found = reader.be32()?;
    if found != VERSION {
        return Ok(Err(CprStateError::Version { found }));
    }
    let mut names = Vec::new();
    loop {
        let at = reader.position();
        match reader.u8()? {
            0 => break,
            1 => {}
            _ => return Ok(Err(CprStateError::Malformed { at })),
        }
        let at = reader.position();
        let length = reader.be32()? as usize;
        let name = reader.bytes(length)?;
        let (id, with) = (reader.be32()?, reader.u8()?);
        let text = name.strip_suffix(&[0]).and_then(|name| std::str::from_utf8(name).ok());
        let Some(name) = text.and_then(|text| BlockName::new(text).ok()) else {
            return Ok(Err(CprStateError::Malformed { at }));
        };
        if with != WITH_DESCRIPTOR {
            return Ok(Err(CprStateError::Malformed { at: reader.position() - 1 }));
        }
        if id != 0 || is_device(name.as_str()) {
            return Ok(Err(CprStateError::Device { name: name.to_string() }));
        }
        names.push(name);
    }
    if reader.rest().is_empty() {
        return Ok(Ok(names));
    }
    let at = reader.position();
    let (kind, length) = (reader.u8()?, usize::from(reader.u8()?));
    let (name, version) = (reader.bytes(length)?, reader.be32()?);
    if kind != SUBSECTION || name != DEVICES || version != 1 {
        return Ok(Err(CprStateError::Malformed { at }));
    }
    match reader.u8()? {
        0 => Ok(Ok(names)),
        _ => Ok(Err(CprStateError::Device { name: "vfio".into() })),
    }
}

/// QEMU's names for descriptors that are no memory.
fn is_device(name: &str) -> bool {
    ["vfio", "iommufd", "tap", "vhost"].iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn state(names: &[(&str, u32)], with_devices: Option<u8>) -> Vec<u8> {
        let mut out = [MAGIC.to_be_bytes(), VERSION.to_be_bytes()].concat();
        for (name, id) in names {
            out.push(1);
            out.extend_from_slice(&(name.len() as u32 + 1).to_be_bytes());
            out.extend_from_slice(name.as_bytes());
            out.push(0);
            out.extend_from_slice(&id.to_be_bytes());
            out.push(WITH_DESCRIPTOR);
        }
        out.push(0);
        if let Some(devices) = with_devices {
            out.extend_from_slice(&[SUBSECTION, 21]);
            out.extend_from_slice(DEVICES);
            out.extend_from_slice(&[0, 0, 0, 1, devices]);
        }
        out
    }

    #[test]
    fn names_come_in_order_with_and_without_the_devices_of_later_qemus() {
        let names = [("/rom@etc/acpi/rsdp", 0), ("pc.bios", 0), ("r0", 0)];
        for devices in [None, Some(0)] {
            let found = decode_cpr_state(&state(&names, devices)).unwrap();
            let found: Vec<_> = found.iter().map(BlockName::as_str).collect();
            assert_eq!(found, ["/rom@etc/acpi/rsdp", "pc.bios", "r0"]);
        }
        assert_eq!(decode_cpr_state(&state(&[], None)), Ok(Vec::new()));
    }

    #[test]
    fn what_is_written_is_what_a_qemu_100_writes() {
        let names = ["/rom@etc/acpi/rsdp", "pc.bios", "r0"];
        let blocks = names.map(|name| BlockName::new(name).unwrap());
        let parts = encode_cpr_state(blocks.iter());
        assert_eq!(parts.len(), names.len() + 1);
        assert_eq!(parts.join(&WITH_DESCRIPTOR), state(&names.map(|name| (name, 0)), None));
        let none = encode_cpr_state([].into_iter());
        assert_eq!(none.join(&WITH_DESCRIPTOR), state(&[], None));
    }

    /// Wherever it ends, and whichever byte is another: no panic, and no more names than there are.
    #[test]
    fn a_state_that_is_cut_or_changed_is_no_other_state() {
        let whole = state(&[("pc.bios", 0), ("r0", 0)], Some(0));
        let without_devices = state(&[("pc.bios", 0), ("r0", 0)], None).len();
        for end in (0..whole.len()).filter(|end| *end != without_devices) {
            let cut = decode_cpr_state(&whole[..end]);
            assert_eq!(cut, Err(CprStateError::Truncated { at: end }), "{end}");
        }
        for at in 0..whole.len() {
            let mut changed = whole.clone();
            changed[at] ^= 0x55;
            assert!(
                decode_cpr_state(&changed).is_ok_and(|names| names.len() == 2)
                    || decode_cpr_state(&changed).is_err()
            );
        }
        let longer = [&whole[..], b"x"].concat();
        assert_eq!(decode_cpr_state(&longer), Err(CprStateError::Malformed { at: whole.len() }));
    }

    #[test]
    fn devices_are_refused_by_name() {
        let refused = |names: &[(&str, u32)], devices| decode_cpr_state(&state(names, devices)).unwrap_err();
        for (names, devices, due) in [
            (&[("vfio_container_for_group", 7)][..], None, "vfio_container_for_group"),
            (&[("iommufd0", 0)], None, "iommufd0"),
            (&[("r0", 3)], None, "r0"),
            (&[("r0", 0)], Some(1), "vfio"),
        ] {
            let text = refused(names, devices).to_string();
            assert!(text.contains(due) && text.contains("device"), "{text}");
        }
        let text = decode_cpr_state(b"QEVM\0\0\0\x03").unwrap_err().to_string();
        assert!(text.contains("type cpr"), "{text}");
    }
}
