//! `ramwire` moves the RAM of a running virtual machine to another host, in QEMU's own migration stream. Either end may
//! be a stock QEMU.
//!
//! A VMM hands over its guest's memory ([`guest::GuestMemory`]), what knows of writes to it ([`guest::DirtySource`]), its
//! control ([`guest::GuestControl`]) and a connection ([`transport`]), and gets a handle
//! ([`session::MigrationHandle`]). `docs/examples/embed.rs` is a whole example.
//!
//! The modules lie in layers; imports point to lower layers only, which `ci/layers` checks.
//!
//! | layer | module | duty |
//! |-------|--------|------|
//! | 4 | [`session`] | threads that do what the engines decide |
//! | 3 | [`page`] | which page is next, and as what it travels |
//! | 3 | [`engine`] | what happens next: state machines without socket, clock or thread |
//! | 3 | [`transport`] | how bytes and pages leave and enter |
//! | 2 | [`guest`] | memory, dirty sources, control of a VM |
//! | 2 | [`stream`] | QEMU's migration stream: bytes in, values out |
//! | 1 | [`ram`] | blocks, bitmaps, runs, batches |
//! | 1 | [`observe`] | counters, histograms, statistics |
//! | 0 | [`sys`] | the kernel; the only unsafe code |
//! | 0 | [`error`], [`units`] | errors and remedies; numbers with units |

pub mod engine;
pub mod error;
pub mod guest;
pub mod observe;
pub mod page;
pub mod ram;
pub mod session;
pub mod stream;
pub mod sys;
pub mod transport;
pub mod units;
