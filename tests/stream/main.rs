//! The stream module against streams that QEMUs wrote.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod captures;
mod fuzz_bodies;
mod replay;

mod hostile;
mod multifd;
mod postcopy;
mod reencode;
mod vectors;
