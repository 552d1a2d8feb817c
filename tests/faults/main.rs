//! Reactions of both ends to a peer that dies, hangs or breaks the protocol, and to a stream that is truncated or
//! changed.
//!
//! - `positions`: two sessions in this process, a fault at every byte outside of pages, and at samples of page bytes.
//! - `kills`: the peer is a process of its own that dies, stops or resets the connection at a chosen stage.
//! - `hostile`: hand-written bytes from a hostile source and a hostile destination.
//! - `qemu`: QEMUs that die, in both roles.
//! - `files`: RAM files that change during a migration.
//! - `flips`: every byte of a stream to a QEMU: which are data, and a QEMU's reaction to a flip.
//! - `full_disk`: a file system that is full while a guest is written to a file.
//! - `running`: the same with guests that run and check their memory.
//! - `command`: the command's signals, options and folders.
//! - `leaving`: `send` is ended by signals at each of its stages; its folder must be correct.
//! - `output`: the output is closed, full or not read.
//! - `unasked`: a QEMU that waits for no answer; options that are refused before anything is done.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod command;
mod files;
mod flips;
mod full_disk;
mod hostile;
mod kills;
mod leaving;
mod live;
mod output;
mod positions;
mod qemu;
mod relay_doubt;
#[cfg(feature = "tls")]
mod relay_doubt_tls;
mod running;
mod terminal;
mod unasked;
