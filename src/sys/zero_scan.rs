//! The zero test, in place.
//!
//! The C library's `memcmp` against a page of zeros: it picks the widest vectors of the CPU at run time, returns at the
//! first difference, and, being opaque to the compiler, may read memory that the guest writes meanwhile. While a page
//! that begins with zeros is scanned, the lines of the next page are prefetched: the CPU's own prefetchers stop at page
//! boundaries. `benches/zero_scan.rs` compares it with our own AVX2, SSE2 and scalar loops: on memory that comes from
//! DRAM, as in a migration, it is faster than all of them.

use super::HostSpan;

/// Bytes of a page that decide whether to prefetch the next one: most pages with data have some of it there.
const HEAD: usize = 128;

/// How many pages ahead [`look_ahead`] prefetches: a page that begins with data is scanned faster than a line arrives.
const PAGES_AHEAD: usize = 8;

static ZEROS: [u8; 4096] = [0; 4096];

/// True if every byte of `span` is zero; an empty span is.
///
/// A byte written meanwhile may or may not be seen; the same write marks the page dirty.
pub fn is_zero(span: HostSpan<'_>) -> bool {
    let mut at = 0;
    while at < span.len() {
        let len = (span.len() - at).min(ZEROS.len());
        let head = len.min(HEAD);
        if !equals_zeros(span, at, head) {
            return false;
        }
        if len == ZEROS.len() {
            fetch_page(span.as_ptr().wrapping_add(at + len));
        }
        if !equals_zeros(span, at + head, len - head) {
            return false;
        }
        at += len;
    }
    true
}

/// Prefetches the first line of a page that is scanned soon: on memory that is not zero, the wait for this line is the
/// whole cost of [`is_zero`].
///
/// Called for each page of `span`, number `index` of `page` bytes, before it is scanned.
#[inline]
pub(crate) fn look_ahead(span: HostSpan<'_>, index: usize, page: usize) {
    fetch_line(span.as_ptr().wrapping_add((index + PAGES_AHEAD) * page));
}

/// Whether `len` bytes of `span` from `at` on are zero; at most a page, inside the span.
fn equals_zeros(span: HostSpan<'_>, at: usize, len: usize) -> bool {
    debug_assert!(at + len <= span.len() && len <= ZEROS.len());
    // SAFETY: at + len <= span.len() and len <= ZEROS.len(), so both sides are mapped for `len` bytes; memcmp is
    // opaque, so concurrent writers can only change its result.
    unsafe { libc::memcmp(span.as_ptr().add(at).cast(), ZEROS.as_ptr().cast(), len) == 0 }
}

/// Prefetches the lines of the page at `start`, which need not be mapped.
fn fetch_page(start: *const u8) {
    (0..ZEROS.len()).step_by(64).for_each(|line| fetch_line(start.wrapping_add(line)));
}

/// Prefetches the line of `at`, which need not be mapped.
#[inline]
fn fetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch is a hint that faults at no address.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;

    #[test]
    fn one_byte_anywhere_is_seen_and_none_outside() {
        let mapping = Mapping::anonymous(16384).unwrap();
        for (start, len) in [(4096, 4096), (4096, 8192), (4097, 4095), (100, 1), (8191, 2), (0, 0)] {
            let span = mapping.region().span(start, len).unwrap();
            assert!(is_zero(span), "{start} {len}");
            let inside =
                (start..start + len).filter(|at| at % 61 == 0 || *at == start || at + 1 == start + len);
            let outside = [start.wrapping_sub(1), start + len];
            for (at, zero) in inside.map(|at| (at, false)).chain(outside.map(|at| (at, true))) {
                let Ok(byte) = mapping.region().span(at, 1) else { continue };
                byte.copy_from(&[0x80]);
                assert_eq!(is_zero(span), zero, "byte {at} of {start} {len}");
                byte.copy_from(&[0]);
            }
        }
    }
}
