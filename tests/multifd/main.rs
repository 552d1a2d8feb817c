//! Page channels (`multifd`): with QEMUs, and against sources that break the rules.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod counts;
mod hostile;
mod numa;
mod panics;
mod peers;
mod splice;
mod zero_copy;
