#![no_main]

#[path = "../../stream/fuzz_bodies.rs"]
#[allow(dead_code)]
mod fuzz_bodies;

// The first byte selects the type of the rest.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&what, bytes)) = data.split_first() {
        match what % 4 {
            0 => fuzz_bodies::record(bytes),
            1 => fuzz_bodies::command(bytes),
            2 => fuzz_bodies::message(bytes),
            _ => fuzz_bodies::xbzrle_page(bytes),
        }
    }
});
