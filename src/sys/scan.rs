//! The zero test, in place.
use super::HostSpan;
/// True if `span` is one 4 KiB page of zeros.
pub fn is_zero(span: HostSpan<'_>) -> bool {
    static ZERO: [u8; 4096] = [0; 4096];
    // SAFETY: the span is mapped for its 4096 bytes; memcmp is opaque to the compiler.
    span.len() == 4096 && unsafe { libc::memcmp(span.as_ptr().cast(), ZERO.as_ptr().cast(), 4096) == 0 }
}
