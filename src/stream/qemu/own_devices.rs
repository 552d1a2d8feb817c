//! The device state of a VMM without QEMU device sections, for a stream without a return path: it is one section, so
//! that the stream's end can be verified.

use super::section::{
    Framing, Item, SectionName, decode_item, encode_eof, encode_full, encode_vm_description,
};
use super::tail::{Tail, without_devices};

/// Name of the section. A QEMU has no such device, and its error for the guest gives this name.
const OWN_DEVICES: &str = "ramwire/devices";
/// Id of the section: above every id that a QEMU assigns.
const OWN_DEVICES_ID: u32 = 0x5257_0002;

/// The tail after the pages for a guest whose VMM has saved `state`. If `state` is QEMU's (complete sections with their
/// description), the tail is `state`. If it is not, the tail wraps it in a section of our own. If it is empty, the tail
/// has no device. Pages have `page_size` bytes.
pub fn tail_of(state: Vec<u8>, page_size: u64, framing: Framing) -> Vec<u8> {
    if state.is_empty() {
        return without_devices(page_size);
    }
    if super::state::sections_end(&state, framing).is_some() {
        return state;
    }
    let mut out = Vec::with_capacity(state.len() + 256);
    encode_full(&SectionName { id: OWN_DEVICES_ID, idstr: OWN_DEVICES, instance: 0, version: 1 }, &mut out);
    out.extend_from_slice(&state);
    framing.encode_footer(OWN_DEVICES_ID, &mut out);
    encode_eof(&mut out);
    let device = format!(r#"{{"name": "{OWN_DEVICES}", "instance_id": 0, "size": {}}}"#, state.len());
    encode_vm_description(
        format!(r#"{{"page_size": {page_size}, "devices": [{device}]}}"#).as_bytes(),
        &mut out,
    );
    out
}

/// The VMM's own state in a tail made by [`tail_of`]; `None` for any other tail.
pub fn own_state(tail: &[u8], framing: Framing) -> Option<&[u8]> {
    let (Item::Full(name), _) = decode_item(tail).ok()? else { return None };
    if name.idstr != OWN_DEVICES {
        return None;
    }
    let mut described = Tail::new(framing);
    described.push(tail, tail.len(), u32::MAX).ok()?;
    let sections = &described.description()?.split.sections;
    let [section] = &sections[..] else { return None };
    tail.get(section.payload.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_of_any_bytes_comes_back_and_a_qemus_stays_what_it_is() {
        for framing in [Framing::default(), Framing { footers: false, ..Framing::default() }] {
            for state in [&b"x"[..], b"\0\x06\0\0\0\x02{}", &[0x7e; 4096]] {
                let tail = tail_of(state.to_vec(), 4096, framing);
                assert_eq!(own_state(&tail, framing), Some(state));
                assert_eq!(tail_of(tail.clone(), 4096, framing), tail, "it is sections already");
                assert_eq!(own_state(&tail[..tail.len() - 1], framing), None);
            }
            assert_eq!(tail_of(Vec::new(), 4096, framing), without_devices(4096));
            assert_eq!(own_state(&without_devices(4096), framing), None);
        }
    }
}
