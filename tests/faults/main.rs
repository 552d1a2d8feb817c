//! What both ends make of a peer that dies, hangs or lies, and of a stream that is cut or changed on its way.
//!
//! - `positions`: two sessions in this process, a fault at every byte that is not a page's, and at samples of those.
//! - `kills`: the peer is a process of its own that dies, freezes or resets the connection at a chosen stage.
//! - `hostile`: bytes made by hand, from a source and from a destination that mean harm.
//! - `qemu`: real QEMUs that die, in both roles.
//! - `files`: RAM files that change under a migration.
//! - `flips`: every byte of a stream to a QEMU: which are data, and what a QEMU makes of a flip.
//! - `running`: the same with guests that run and check their memory.
//! - `command`: the command's signals, options and folders.
//! - `leaving`: `send` is ended by signals at each of its stages; its folder says what is true.
//! - `output`: the output is closed, full or not read.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../common/mod.rs"]
mod common;

mod command;
mod files;
mod flips;
mod hostile;
mod kills;
mod leaving;
mod live;
mod output;
mod positions;
mod qemu;
mod relay_doubt;
mod running;
mod terminal;
