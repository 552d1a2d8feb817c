//! The smallest guest that never stops writing: a multiboot image of 23 instruction bytes, for machines on which a
//! Linux would take minutes to boot.

use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::{
    Deadline,
    qemu::{Guest, Machine, Version},
};

/// Guest memory; not a multiple of 256 KiB, see [`WRITER_RAM_KIB`](super::writer::WRITER_RAM_KIB).
const RAM_KIB: usize = (16 << 10) + 8;
const LOADED_AT: u32 = 0x10_0000;
/// The first of the pages it writes.
const PAGES_AT: u32 = 0x20_0000;
/// Number of pages: 1 MiB, so that they fit into a downtime at the rate of an emulated NIC.
const PAGES: u32 = 256;

/// Counts up the first word of every page, for ever.
fn program() -> Vec<u8> {
    let mut code = vec![0xbf]; // mov edi, PAGES_AT
    code.extend(PAGES_AT.to_le_bytes());
    code.push(0xb9); // mov ecx, PAGES
    code.extend(PAGES.to_le_bytes());
    code.extend([0xff, 0x07]); // inc dword [edi]
    code.extend([0x81, 0xc7, 0, 0x10, 0, 0]); // add edi, 4096
    code.push(0x49); // dec ecx
    code.extend([0x75, 0xf5]); // jnz to the inc
    code.extend([0xeb, 0xe9]); // jmp to the start
    code
}

/// Waits for ever, with interrupts off: memory stays as it is.
fn waiting_program() -> Vec<u8> {
    vec![0xfa, 0xf4, 0xeb, 0xfd] // cli; hlt; jmp to the hlt
}

/// The image, with its header first (Multiboot Specification 0.6.96, section 3.1).
fn image(code: Vec<u8>) -> Vec<u8> {
    const MAGIC: u32 = 0x1bad_b002;
    const HAS_ADDRESSES: u32 = 1 << 16;
    const HEADER_BYTES: u32 = 32;
    let end = LOADED_AT + HEADER_BYTES + code.len() as u32;
    let checksum = 0u32.wrapping_sub(MAGIC).wrapping_sub(HAS_ADDRESSES);
    // Header, load, end of load, end of bss, entry.
    let addresses = [LOADED_AT, LOADED_AT, end, end, LOADED_AT + HEADER_BYTES];
    let words = [MAGIC, HAS_ADDRESSES, checksum].into_iter().chain(addresses);
    words.flat_map(u32::to_le_bytes).chain(code).collect()
}

/// A guest that boots it; with [`Guest::incoming`] its destination, which stays paused.
pub(crate) fn guest(version: Version, machine: Machine, dir: &Path, name: &str) -> Guest {
    booting(program(), version, machine, dir, name)
}

/// The same for a guest that writes nothing.
pub(crate) fn waiting_guest(version: Version, machine: Machine, dir: &Path, name: &str) -> Guest {
    booting(waiting_program(), version, machine, dir, name)
}

fn booting(code: Vec<u8>, version: Version, machine: Machine, dir: &Path, name: &str) -> Guest {
    let kernel = dir.join("scribbler");
    fs::write(&kernel, image(code)).expect("cannot write the guest's program");
    let ram = dir.join(format!("{name}.ram"));
    let file = File::create(&ram).expect("cannot create guest memory");
    file.set_len(RAM_KIB as u64 * 1024).expect("cannot size guest memory");
    let mut guest = Guest::new(version, machine, ram, 0).with(["-kernel".into(), kernel]);
    guest.ram_kib = RAM_KIB;
    guest
}

/// The counter in its last page.
pub(crate) fn count(ram: &PathBuf) -> u32 {
    let mut word = [0; 4];
    let at = u64::from(PAGES_AT + (PAGES - 1) * 4096);
    File::open(ram).and_then(|file| file.read_exact_at(&mut word, at)).expect("cannot read guest memory");
    u32::from_le_bytes(word)
}

/// The counters of all its pages, in the order in which it counts: at any moment the first ones are ahead by one, and only
/// if memory and processor are of the same moment it stays so.
pub(crate) fn counters(ram: &Path) -> Vec<u32> {
    let file = File::open(ram).expect("cannot open guest memory");
    let word = |page: u32| {
        let mut word = [0; 4];
        file.read_exact_at(&mut word, u64::from(PAGES_AT + page * 4096)).expect("cannot read guest memory");
        u32::from_le_bytes(word)
    };
    (0..PAGES).map(word).collect()
}

/// Waits until it writes (on).
pub(crate) fn wait_until_it_writes(ram: &PathBuf, deadline: Deadline) {
    let before = count(ram);
    deadline.poll("the guest writes", || format!("{before} passes"), || (count(ram) != before).then_some(()));
}
