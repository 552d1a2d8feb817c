//! The command: words for people around the library.
#![allow(unreachable_pub)]

mod args;
mod bench;
mod common;
mod demo;
mod devices;
mod inspect;
#[allow(dead_code, reason = "shared by the reports that draw")]
mod plot;
mod progress;
mod receive;
mod relay;
mod render;
mod send;
mod store;

pub use args::run;
