//! Pages as zlib streams, which older sources send when their capability `compress` is on.

use flate2::{Decompress, FlushDecompress, Status};

use super::super::error::Fault;

/// Inflates one page: a complete zlib stream that gives exactly the bytes of `page`.
///
/// Output beyond the page is never produced, whatever `input` claims.
///
/// # Errors
///
/// [`Fault::Inflate`] if `input` is no zlib stream, is not finished, or gives more or fewer bytes.
pub fn inflate_page(input: &[u8], page: &mut [u8]) -> Result<(), Fault> {
    let page_bytes = page.len() as u64;
    let wrong = || Fault::Inflate { page_bytes };
    let mut inflate = Decompress::new(true);
    let status = inflate.decompress(input, page, FlushDecompress::Finish).map_err(|_| wrong())?;
    let whole = inflate.total_out() == page_bytes && inflate.total_in() == input.len() as u64;
    if status == Status::StreamEnd && whole { Ok(()) } else { Err(wrong()) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::ZlibEncoder;

    use super::*;

    fn deflated(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::new(6));
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn s32_a_compressed_page_gives_exactly_one_page() {
        let content: Vec<u8> = (0..4096u32).map(|i| ((i * i) >> 5) as u8).collect();
        let good = deflated(&content);
        let mut page = vec![0; 4096];
        assert_eq!(inflate_page(&good, &mut page), Ok(()));
        assert_eq!(page, content);
        let wrong = Err(Fault::Inflate { page_bytes: 4096 });
        #[rustfmt::skip]
        let cases: &[(&str, Vec<u8>)] = &[
            ("too short",       deflated(&content[..4095])),
            ("too long",        deflated(&[&content[..], &[0]].concat())),
            ("a bomb",          deflated(&vec![0; 1 << 20])),
            ("not finished",    good[..good.len() - 4].to_vec()),
            ("bytes behind",    [&good[..], &[0]].concat()),
            ("no zlib",         content.clone()),
            ("nothing",         vec![]),
        ];
        for (what, input) in cases {
            assert_eq!(inflate_page(input, &mut page), wrong, "{what}");
        }
    }
}
