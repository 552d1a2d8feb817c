//! `ramwire` moves the RAM of a running virtual machine to another host, in QEMU's own migration stream. Either end may
//! be a stock QEMU (7.2, 10.0 and 11.1 are tested).
//!
//! A VMM hands over its guest's memory ([`guest::GuestMemory`]), the sources that report writes to it
//! ([`guest::DirtySource`]), its control ([`guest::GuestControl`]) and a connection ([`transport`]), and receives a
//! handle ([`session::MigrationHandle`]). Dirty pages are sent in rounds while the guest runs; then it is paused, the
//! rest is sent, and ownership passes to the destination at one moment. Before it every failure leaves the guest
//! running at its source.
//!
//! # A migration in one process
//!
//! ```
//! use std::os::unix::net::UnixStream;
//! use std::sync::Arc;
//!
//! use ramwire::guest::{GuestControl, MappedGuest};
//! use ramwire::guest::synthetic::{SyntheticConfig, SyntheticGuest};
//! use ramwire::ram::{BlockName, RamBlock};
//! use ramwire::session::{
//!     DestinationConnection, DestinationGuest, DestinationSession, DestinationSettings, Ending, Outcome, SourceConnection,
//!     SourceGuest, SourceSession, SourceSettings,
//! };
//! use ramwire::sys::Mapping;
//! use ramwire::transport::{StreamChannel, StreamOptions};
//! use ramwire::units::PageSize;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! // Guest RAM at each end: one block, named as both ends know it. A VMM names the memory that it has mapped.
//! let memory = || -> Result<_, Box<dyn std::error::Error>> {
//!     let block = RamBlock::new(BlockName::new("pc.ram")?, 16 << 20);
//!     let mapping = Mapping::memfd("pc.ram", 16 << 20)?;
//!     Ok(Arc::new(MappedGuest::builder(PageSize::SIZE_4K).mapping(block, &mapping).build()?))
//! };
//! // Guests without a machine: threads that write pages. A VMM implements `GuestControl`.
//! let mut here = SyntheticGuest::filled(memory()?, SyntheticConfig::default())?;
//! let mut there = SyntheticGuest::empty(memory()?);
//! here.resume()?;
//!
//! let (near, far) = UnixStream::pair()?;
//! let channel = |socket: UnixStream| StreamChannel::from_fd(socket.into(), "peer", &StreamOptions::default());
//!
//! let connection = DestinationConnection::over(channel(far)?);
//! let guest = DestinationGuest { memory: Box::new(there.memory().clone()), control: Box::new(there.clone()) };
//! let arriving = DestinationSession::new(guest, connection, DestinationSettings::default()).spawn()?;
//!
//! let connection = SourceConnection::over(channel(near)?, here.memory().clone());
//! let guest = SourceGuest { memory: here.memory().clone(), dirty: vec![here.software()], control: Box::new(here) };
//! let leaving = SourceSession::new(guest, connection, SourceSettings::default()).spawn()?;
//!
//! assert_eq!(leaving.wait()?.outcome, Outcome::Completed);
//! assert_eq!(arriving.wait()?.ending, Ending::Running);
//! there.pause()?;
//! let found = there.verify()?; // every page, against what the guest had written
//! assert!(found.is_whole(), "{found:?}");
//! # Ok(())
//! # }
//! ```
//!
//! `docs/examples/embed.rs` shows a VMM with its own memory, dirty bitmap and control; `docs/examples/tiny-vmm` one
//! with KVM; `docs/embedding.md` describes the rules for a VMM.
//!
//! # The parts
//!
//! The modules lie in layers; imports point to lower layers only, which `ci/layers` checks.
//!
//! | layer | module | duty |
//! |-------|--------|------|
//! | 4 | [`session`] | threads that perform the engines' decisions |
//! | 3 | `page` | which page is next, and in which form it is sent |
//! | 3 | `engine` | what happens next: state machines without socket, clock or thread |
//! | 3 | [`transport`] | sending and receiving of bytes and pages |
//! | 2 | [`guest`] | memory, dirty sources, control of a VM |
//! | 2 | `stream` | QEMU's migration stream: bytes in, values out |
//! | 1 | [`ram`] | blocks, bitmaps, runs, batches |
//! | 1 | [`observe`] | counters, histograms, statistics |
//! | 0 | [`sys`] | the kernel; the only unsafe code |
//! | 0 | [`error`], [`units`] | errors and remedies; numbers with units |
//!
//! # What is stable
//!
//! The stream is stable: towards a QEMU it is QEMU's format, and two ramwires of different versions negotiate in the
//! greeting. The API is not stable before 1.0. `engine`, `page` and `stream`, and the test tools, are internal: feature
//! `testing` exposes them, and they may change at any time. [`session`] and [`transport`] re-export the parts that a
//! VMM needs. Settings, options, figures and most enums are `#[non_exhaustive]`: start from the default and set fields,
//! and match with a wildcard. `docs/api/` lists every public item, so that a diff shows every change.
//!
//! # Features
//!
//! | feature | adds | building it needs |
//! |---------|------|-------------------|
//! | `kvm` | KVM's dirty log and dirty rings as dirty sources | |
//! | `rdma` | the `rdma:` transport; librdmacm and libibverbs are loaded at run time | cmake, a C compiler, libclang |
//! | `tls` | TLS for `tcp:` and `unix:` (`transport::Tls`), as QEMU's `tls-creds-x509` | a C compiler |
//! | `vm-memory` | RAM blocks over the memory of rust-vmm's `vm-memory` | |
//! | `cli` | the command `ramwire`; brings `testing` | |
//! | `testing` | a guest without a VM (`guest::synthetic`), links that fail on purpose, and the internal modules | |
//!
//! All are on by default; an embedder turns `cli` off. Every build needs libclang, for the bindings of userfaultfd.
//!
//! # Platforms
//!
//! Linux on x86-64 with glibc is built and tested. For aarch64 it is built, and unit tests run in an emulator; `kvm`'s
//! example guests are x86-64 code. musl is not supported with `rdma`: a statically linked program can't load libraries.

#[cfg(feature = "testing")]
pub mod engine;
#[cfg(not(feature = "testing"))]
#[allow(dead_code, unreachable_pub, unused_imports)]
mod engine;
pub mod error;
pub mod guest;
pub mod observe;
#[cfg(feature = "testing")]
pub mod page;
#[cfg(not(feature = "testing"))]
#[allow(dead_code, unreachable_pub, unused_imports)]
mod page;
pub mod ram;
pub mod session;
#[cfg(feature = "testing")]
pub mod stream;
#[cfg(not(feature = "testing"))]
#[allow(dead_code, unreachable_pub, unused_imports)]
mod stream;
pub mod sys;
pub mod transport;
pub mod units;
