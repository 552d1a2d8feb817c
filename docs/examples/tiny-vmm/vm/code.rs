//! The guest's program, and what each page must hold while it runs.
//!
//! Each vCPU owns a lane, a stretch of pages that it writes one after the other and round again. Its write number `n`
//! goes to page `n % pages` of the lane, and puts there:
//!
//! | bytes | what |
//! |---|---|
//! | 0-3 | the page's guest address |
//! | 4-7 | `n` |
//! | from 8 on | the check word, as often as a write is long: `n * 0x9e3779b1` XOR the address |
//!
//! Before it writes, it looks whether all of that is still there from write `n - pages`. So a page that a migration lost is
//! found by the guest itself a lap later, even if it is a whole page of an older write. `n` begins with `pages`: writes
//! below that are the fill from before the guest's first instruction, which fills the rest of the page too.
//!
//! All the guest knows is in its registers, and they travel in the device state: EBX where the lane begins, EBP its
//! pages, ESI `n`, ESP check words a write. ESI alone moves the guest on, by one instruction.

use std::io;

use ramwire::guest::{GuestMemory, MappedGuest};
use ramwire::ram::PageRun;
use ramwire::units::{BlockIndex, PageIndex};

use super::Shape;

/// The guest leaves by these ports: a page is written; a page is not what it must be; `n` does not fit ESI any more.
pub(super) const WROTE: u16 = 0x10;
pub(super) const WRONG: u16 = 0x11;
pub(super) const USED_UP: u16 = 0x12;

/// 32-bit code without paging, position-independent; it needs no stack and no memory but its lane.
#[rustfmt::skip]
pub(super) const CODE: [u8; 82] = [
    // next:
    0x89, 0xf0,                         // mov  eax, esi
    0x31, 0xd2,                         // xor  edx, edx
    0xf7, 0xf5,                         // div  ebp             edx = n % pages
    0x89, 0xd7,                         // mov  edi, edx
    0xc1, 0xe7, 0x0c,                   // shl  edi, 12
    0x01, 0xdf,                         // add  edi, ebx        edi = the page
    0x89, 0xf0,                         // mov  eax, esi
    0x29, 0xe8,                         // sub  eax, ebp        eax = n - pages
    0x39, 0x3f,                         // cmp  [edi], edi
    0x75, 0x39,                         // jne  wrong
    0x39, 0x47, 0x04,                   // cmp  [edi+4], eax
    0x75, 0x34,                         // jne  wrong
    0x69, 0xc0, 0xb1, 0x79, 0x37, 0x9e, // imul eax, eax, 0x9e3779b1
    0x31, 0xf8,                         // xor  eax, edi
    0x89, 0xfa,                         // mov  edx, edi
    0x83, 0xc7, 0x08,                   // add  edi, 8
    0x89, 0xe1,                         // mov  ecx, esp
    0xf3, 0xaf,                         // repe scasd
    0x75, 0x21,                         // jne  wrong
    0x89, 0xd7,                         // mov  edi, edx
    0x69, 0xc6, 0xb1, 0x79, 0x37, 0x9e, // imul eax, esi, 0x9e3779b1
    0x31, 0xf8,                         // xor  eax, edi
    0x89, 0x3f,                         // mov  [edi], edi
    0x89, 0x77, 0x04,                   // mov  [edi+4], esi
    0x83, 0xc7, 0x08,                   // add  edi, 8
    0x89, 0xe1,                         // mov  ecx, esp
    0xf3, 0xab,                         // rep  stosd
    0x46,                               // inc  esi
    0x74, 0x04,                         // jz   used_up
    0xe6, 0x10,                         // out  0x10, al
    0xeb, 0xb6,                         // jmp  next
    // used_up:
    0xe6, 0x12,                         // out  0x12, al
    0xeb, 0xfc,                         // jmp  used_up
    // wrong:
    0xe6, 0x11,                         // out  0x11, al
    0xeb, 0xfc,                         // jmp  wrong
];

pub(super) const PAGE: u64 = 4096;
const WORDS: usize = 1024;
const HEADER: u32 = 8;

/// A page, as its 1024 words.
pub(super) type Words = [u32; WORDS];

/// A vCPU's pages.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    pub(super) block: BlockIndex,
    /// Page of the block where it begins.
    pub(super) first: u64,
    pub(super) pages: u32,
    /// Guest address of its first page.
    pub(super) address: u32,
}

/// What a page is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Duty {
    /// Holds the program.
    Code,
    /// Page number `index` of a vCPU's lane.
    Written { vcpu: usize, index: u32 },
    /// Was filled and is never written.
    Still,
}

/// The shape laid over the blocks.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) lanes: Vec<Lane>,
    /// Guest address of each block.
    addresses: Vec<u32>,
    check_words: u32,
    zero: u32,
}

impl Plan {
    /// Lanes go round robin over the larger blocks; the program lies in the first page of the first block.
    pub(super) fn new(memory: &MappedGuest, addresses: &[u32], shape: &Shape) -> io::Result<Self> {
        let blocks = memory.table().blocks();
        let pages: Vec<u64> = blocks.iter().map(|block| block.used_length / PAGE).collect();
        let largest = pages.iter().copied().max().unwrap_or(0);
        let large: Vec<usize> = (0..pages.len()).filter(|at| pages[*at] * 4 >= largest).collect();
        let wanted = (shape.working_set / PAGE / u64::from(shape.vcpus.max(1))).max(1);
        let mut lanes = Vec::new();
        for vcpu in 0..shape.vcpus as usize {
            let at = *large.get(vcpu % large.len().max(1)).ok_or_else(|| invalid("no RAM".into()))?;
            // How many lanes this block has, and which of them this is.
            let here = (shape.vcpus as usize - vcpu % large.len()).div_ceil(large.len()) as u64;
            let place = (vcpu / large.len()) as u64;
            let free = pages[at].saturating_sub(1);
            let lane = wanted.min(free / here);
            let first = 1 + place * (free / here);
            let (Ok(count), Ok(offset)) = (u32::try_from(lane), u32::try_from(first * PAGE)) else {
                return Err(invalid("a lane has at most 4 GiB".into()));
            };
            if count == 0 {
                let why = format!("RAM block {} has no page for vCPU {vcpu}; give more RAM", blocks[at].name);
                return Err(invalid(why));
            }
            let block = BlockIndex(at as u32);
            lanes.push(Lane { block, first, pages: count, address: addresses[at] + offset });
        }
        let check_words = (shape.write_size.saturating_sub(HEADER) / 4).clamp(1, WORDS as u32 - HEADER / 4);
        Ok(Self { lanes, addresses: addresses.to_vec(), check_words, zero: shape.zero.min(100) })
    }

    /// Check words a write puts into its page.
    pub(super) fn check_words(&self) -> u32 {
        self.check_words
    }

    pub(super) fn duty(&self, run: PageRun) -> Duty {
        let page = run.first.0;
        if run.block == BlockIndex(0) && page == 0 {
            return Duty::Code;
        }
        let mut lanes = self.lanes.iter().enumerate();
        let mine = lanes.find_map(|(vcpu, lane)| {
            let index = u32::try_from(page.checked_sub(lane.first)?).ok()?;
            (lane.block == run.block && index < lane.pages).then_some(Duty::Written { vcpu, index })
        });
        mine.unwrap_or(Duty::Still)
    }

    fn address(&self, run: PageRun) -> u32 {
        // Blocks end below 4 GiB, as was checked when their addresses were chosen.
        self.addresses[run.block.as_usize()] + (run.first.0 * PAGE) as u32
    }

    /// What the page holds before the guest's first instruction.
    pub(super) fn fill(&self, run: PageRun) -> Words {
        let address = self.address(run);
        match self.duty(run) {
            Duty::Code => {
                let mut words = [0; WORDS];
                for (word, bytes) in words.iter_mut().zip(CODE.chunks(4)) {
                    let mut whole = [0; 4];
                    whole[..bytes.len()].copy_from_slice(bytes);
                    *word = u32::from_le_bytes(whole);
                }
                words
            }
            Duty::Written { index, .. } => written(address, index),
            Duty::Still if check_word(address, !0) >> 8 < self.zero * ((1 << 24) / 100) => [0; WORDS],
            Duty::Still => written(address, 0),
        }
    }

    /// What the page holds after its vCPU's write number `n`, which is not below the pages of the lane.
    pub(super) fn after(&self, run: PageRun, n: u32) -> Words {
        let mut words = self.fill(run);
        let upto = (HEADER / 4 + self.check_words) as usize;
        words[..upto].copy_from_slice(&written(self.address(run), n)[..upto]);
        words
    }
}

/// Every word of a page as write `n` would leave it if it were as long as the page.
fn written(address: u32, n: u32) -> Words {
    let mut words = [check_word(address, n); WORDS];
    (words[0], words[1]) = (address, n);
    words
}

fn check_word(address: u32, n: u32) -> u32 {
    n.wrapping_mul(0x9e37_79b1) ^ address
}

/// Every page of every block.
pub(super) fn all_pages(memory: &MappedGuest) -> impl Iterator<Item = PageRun> {
    let blocks = memory.table().blocks().iter().enumerate();
    blocks.flat_map(|(block, ram)| {
        let block = BlockIndex(block as u32);
        (0..ram.used_length / PAGE).map(move |page| PageRun { block, first: PageIndex(page), pages: 1 })
    })
}

pub(super) fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}
