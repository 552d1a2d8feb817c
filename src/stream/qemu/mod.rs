//! QEMU's migration stream.

pub mod blocks;
pub mod command;
pub mod file;
pub mod ram;
pub mod return_path;
pub mod section;
