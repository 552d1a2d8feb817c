#![no_main]

#[path = "../../../rdma-hooks/tests/common/mod.rs"]
mod common;

use common::fuzz_bodies::{Mode, destination, messages};

// The first byte is the mode, the rest are messages of the peer.
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some((&mode, says)) = data.split_first() {
        let _ = destination(Mode::from_bits(mode), messages(says));
    }
});
