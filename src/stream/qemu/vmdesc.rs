//! The VM description: JSON after the device sections that contains their sizes.
//!
//! Device sections carry no length, so a stream of them cannot be split into sections while it is read. The description
//! that follows lists them in stream order with the size of every field. With it the bytes can be split exactly, and
//! each footer at its expected offset confirms the split.

use std::ops::Range;

use serde::Deserialize;

use super::section::{Framing, Item, SectionName, decode_item};

/// The fields of the JSON that affect lengths.
#[derive(Clone, Debug, Deserialize)]
pub struct VmDescription {
    /// Target page size in bytes.
    #[serde(default)]
    pub page_size: Option<u64>,
    /// Sections in stream order.
    pub devices: Vec<Device>,
}

/// One section of the description.
#[derive(Clone, Debug, Deserialize)]
pub struct Device {
    /// The section's idstr.
    pub name: String,
    /// Its instance.
    pub instance_id: u32,
    /// Absent for sections in the old format, where `size` counts.
    #[serde(default)]
    vmsd_name: Option<String>,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

#[derive(Clone, Debug, Deserialize)]
struct Field {
    size: u64,
    #[serde(default)]
    array_len: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Subsection {
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Subsection>,
}

impl VmDescription {
    /// Parses the JSON; `None` if it is no VM description.
    pub fn parse(json: &[u8]) -> Option<Self> {
        serde_json::from_slice(json).ok()
    }

    /// True if the first section in `sections` is the first described one, ignoring early sections.
    pub fn begins_with(&self, sections: &[u8]) -> bool {
        let first = self.devices.iter().find(|device| !super::early::is_early_virtio_mem(&device.name));
        let Ok((Item::Full(name), _)) = decode_item(sections) else { return false };
        first.is_some_and(|device| device.name == name.idstr && device.instance_id == name.instance)
    }
}

impl Device {
    /// Length of the section's payload in bytes; `None` if the numbers do not fit.
    pub fn payload_len(&self) -> Option<u64> {
        match (&self.vmsd_name, self.size) {
            (None, Some(size)) => Some(size),
            _ => body_len(&self.fields, &self.subsections),
        }
    }
}

/// A field of type struct has its total in `size`; a subsection adds type byte, counted name and version.
fn body_len(fields: &[Field], subsections: &[Subsection]) -> Option<u64> {
    let mut total = 0u64;
    for field in fields {
        total = total.checked_add(field.size.checked_mul(field.array_len.unwrap_or(1))?)?;
    }
    for sub in subsections {
        let head = 6 + sub.vmsd_name.len() as u64;
        total = total.checked_add(head)?.checked_add(body_len(&sub.fields, &sub.subsections)?)?;
    }
    Some(total)
}

/// A device section inside the tail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSection {
    /// Its idstr.
    pub name: String,
    /// Its instance.
    pub instance: u32,
    /// Its id in the stream.
    pub id: u32,
    /// Version of its format.
    pub version: u32,
    /// Range of its payload, counted from the start of the tail.
    pub payload: Range<usize>,
}

/// The device sections, as the description divides them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Sections whose header and footer are at the described offsets, from the front.
    pub sections: Vec<DeviceSection>,
    /// Why the rest could not be split, and from which offset in the tail on; `None`: everything fits.
    pub unreliable: Option<(usize, &'static str)>,
}

impl Split {
    /// True if every byte belongs to a section whose footer, if the stream has footers, was found.
    pub fn is_exact(&self) -> bool {
        self.unreliable.is_none()
    }
}

/// Splits `sections`, the bytes from the first device section to the end-of-file byte (exclusive), with `description`.
///
/// Leading entries that name early sections, which are elsewhere in the stream, are skipped. Everything is checked: a
/// header or footer that is not at its expected offset ends the split. Without footers only the next header confirms a
/// split.
pub fn split(sections: &[u8], description: &VmDescription, framing: Framing) -> Split {
    let mut split = Split::default();
    let mut at = 0;
    for device in &description.devices {
        match cut(sections, at, device, framing) {
            Ok(section) => {
                at = section.payload.end + framing.footer_len();
                split.sections.push(section);
            }
            Err(_) if at == 0 && super::early::is_early_virtio_mem(&device.name) => {}
            Err(why) => {
                split.unreliable = Some((at, why));
                return split;
            }
        }
    }
    if at != sections.len() {
        split.unreliable = Some((at, "bytes follow that the description does not name"));
    }
    split
}

fn cut(sections: &[u8], at: usize, device: &Device, framing: Framing) -> Result<DeviceSection, &'static str> {
    let rest = sections.get(at..).unwrap_or(&[]);
    let Ok((Item::Full(SectionName { id, idstr, instance, version }), used)) = decode_item(rest) else {
        return Err("no device section stands here");
    };
    if idstr != device.name || instance != device.instance_id {
        return Err("another section stands here than the description names");
    }
    let len = device.payload_len().and_then(|len| usize::try_from(len).ok());
    let start = at + used;
    let end = len.and_then(|len| start.checked_add(len)).ok_or("the description's sizes overflow")?;
    let footer = sections.get(end..).ok_or("the section is longer than the stream")?;
    framing.decode_footer(footer, id).map_err(|_| "the footer is not where the description puts it")?;
    Ok(DeviceSection { name: idstr.to_owned(), instance, id, version, payload: start..end })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::section::{encode_footer, encode_full};
    use super::*;

    fn section(id: u32, idstr: &str, payload: &[u8], out: &mut Vec<u8>) {
        encode_full(&SectionName { id, idstr, instance: 0, version: 1 }, out);
        out.extend_from_slice(payload);
        encode_footer(id, out);
    }

    const JSON: &[u8] = br#"{"page_size": 4096, "devices": [
        {"name": "0000:00:01.0/virtio-mem-device-early", "instance_id": 0, "vmsd_name": "x", "fields": []},
        {"name": "timer", "instance_id": 0, "vmsd_name": "timer", "version": 2,
         "fields": [{"name": "a", "type": "int64", "size": 8}, {"name": "b", "array_len": 3, "size": 2}],
         "subsections": [{"vmsd_name": "timer/x", "version": 1, "fields": [{"name": "c", "size": 1}]}]},
        {"name": "slirp", "instance_id": 0, "size": 4, "fields": [{"name": "data", "size": 4, "type": "buffer"}]}]}"#;

    fn blob() -> Vec<u8> {
        let mut out = Vec::new();
        section(3, "timer", &[0x7e; 8 + 6 + 6 + 7 + 1], &mut out);
        section(4, "slirp", &[0; 4], &mut out);
        out
    }

    #[test]
    fn s18_a_tail_is_cut_by_the_sizes_of_its_description() {
        let split = split(&blob(), &VmDescription::parse(JSON).unwrap(), Framing::default());
        assert!(split.is_exact(), "{split:?}");
        let found: Vec<_> = split.sections.iter().map(|s| (s.name.as_str(), s.id, s.payload.len())).collect();
        assert_eq!(found, [("timer", 3, 28), ("slirp", 4, 4)]);
    }

    #[test]
    fn s18_a_cut_that_meets_no_footer_is_unreliable() {
        let description = VmDescription::parse(JSON).unwrap();
        let blob = blob();
        let timer_end = blob.len() - (5 + 1 + 5 + 8 + 4 + 5);
        #[rustfmt::skip]
        let cases: &[(&str, Vec<u8>, usize)] = &[
            ("a byte more in a section", [&blob[..30], &[0], &blob[30..]].concat(), 0),
            ("bytes behind",             [&blob[..], &[4]].concat(),                blob.len()),
            ("the last section missing", blob[..timer_end].to_vec(),                timer_end),
            ("cut inside",               blob[..40].to_vec(),                       0),
            ("empty",                    vec![],                                    0),
        ];
        for (what, blob, at) in cases {
            let split = split(blob, &description, Framing::default());
            assert_eq!(split.unreliable.map(|(at, _)| at), Some(*at), "{what}: {split:?}");
        }
        let huge = br#"{"devices": [{"name": "timer", "instance_id": 0, "vmsd_name": "t",
            "fields": [{"size": 18446744073709551615, "array_len": 2}]}]}"#;
        assert!(
            !super::split(&blob, &VmDescription::parse(huge).unwrap(), Framing::default()).is_exact(),
            "sizes overflow"
        );
        assert!(VmDescription::parse(b"{\"a\": 1}").is_none() && VmDescription::parse(b"{\"dev").is_none());
    }
}
