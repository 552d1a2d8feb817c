#![no_main]

#[path = "../../stream/fuzz_bodies.rs"]
#[allow(dead_code)]
mod fuzz_bodies;

use ramwire::stream::qemu::multifd::Method;

// The first byte is the compression, the rest a channel's bytes.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let methods = [Method::Plain, Method::Zlib, Method::Zstd];
    if let Some((&method, bytes)) = data.split_first() {
        fuzz_bodies::channel(bytes, methods[usize::from(method) % methods.len()]);
    }
});
