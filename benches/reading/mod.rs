//! The minimum cost of reading memory.
#![allow(unsafe_code)]

use ramwire::sys::HostSpan;

/// Reads one word of every 64 bytes of `span` and ORs them.
pub(crate) fn a_word_a_line(span: HostSpan<'_>) -> u64 {
    let start = span.address() as *const u8;
    // SAFETY: at + 8 <= span.len(), and the span is mapped; a volatile read returns whatever a concurrent writer
    // leaves.
    let word = |at: usize| u64::from_ne_bytes(unsafe { start.add(at).cast::<[u8; 8]>().read_volatile() });
    (0..span.len().saturating_sub(7)).step_by(64).fold(0, |all, at| all | word(at))
}
