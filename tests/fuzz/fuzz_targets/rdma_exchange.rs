#![no_main]

#[path = "../../../rdma-hooks/tests/common/mod.rs"]
mod common;

libfuzzer_sys::fuzz_target!(|data: &[u8]| common::fuzz_bodies::exchange(data));
