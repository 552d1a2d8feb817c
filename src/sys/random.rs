//! Unpredictable numbers.

/// 128 bits from the kernel, or from the clock and the address space if the kernel has none. It identifies a migration.
pub(crate) fn random_id() -> [u8; 16] {
    let mut id = [0; 16];
    let got = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::NONBLOCK);
    if got != Ok(id.len()) {
        use std::hash::{BuildHasher, RandomState};
        let half = || RandomState::new().hash_one(std::time::Instant::now()).to_ne_bytes();
        id[..8].copy_from_slice(&half());
        id[8..].copy_from_slice(&half());
    }
    id
}
