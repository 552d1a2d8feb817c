//! QEMU's `rdma:` migration protocol as five hooks, over real verbs or a seeded simulation.
//!
//! Guest RAM travels by RDMA WRITE: the source's NIC reads it in place, the destination's NIC stores it in place, and
//! nothing in between copies a page. The VMM sends only its own migration stream, a few bytes per round. Either end may
//! be a QEMU (7.2 and 10.0 are tested); two ends of this crate agree on more: several queue pairs, several messages in
//! flight, requests for keys in batches, zero ranges in lists, an explicit end.
//!
//! Registered memory is resident. Only memory that cannot be (a file system with DAX) is registered on demand, where
//! the device offers that: soft-RoCE does since Linux 6.15, and is tested with 6.18. Such memory is registered by its
//! addresses in this process: soft-RoCE accepts no others for it.
//!
//! | module | duty |
//! |--------|------|
//! | [`hooks`] | what a VMM calls: [`SourceHooks`], [`DestinationHooks`], the return path |
//! | [`control`], [`capabilities`] | bytes to values and back |
//! | [`blocks`], [`chunk`], [`exchange`] | which memory, which keys, which end may send; no I/O |
//! | [`fabric`] | the operations that the protocol needs from a network |
//! | [`sim`] | a network inside one process: virtual time, seeded faults |
//! | [`tap`] | a fabric around another that reports each posted request |
//! | [`verbs`] | the NIC |
//!
//! # How a VMM calls the hooks
//!
//! The same calls as QEMU's page loop makes. The source: connect, name the blocks, then rounds; each round opens with
//! a mark in the stream. The destination: accept, learn the block order from the stream, and serve a round whenever
//! the parser meets a mark.
//!
//! ```
//! use std::sync::Arc;
//! use std::time::Duration;
//!
//! use rdma_hooks::sim::{Host, Sim, SimConfig, SparseMemory};
//! use rdma_hooks::{
//!     BlockSpan, Cancel, DestinationConfig, DestinationHooks, Fabric, HookMark, HooksError, HostRegion, PageContent,
//!     RamBlock, RamControl, RegionMemory, SourceConfig, SourceHooks, Stop,
//! };
//!
//! # fn main() -> Result<(), HooksError> {
//! // Two hosts on a simulated network. On real hardware: `verbs::VerbsFabric::open()` on each.
//! let sim = Sim::new(SimConfig::default());
//! let (here, there) = (sim.fabric(Host::A), sim.fabric(Host::B));
//! let (ram_here, ram_there) = (Arc::new(SparseMemory::new(2 << 20)), Arc::new(SparseMemory::new(2 << 20)));
//! ram_here.write(0x5000, b"a guest's page");
//!
//! let mut listener = there.listen("10.0.0.2", 4444)?;
//! let part = there.enter();
//! let memory = ram_there.clone();
//! let destination = std::thread::spawn(move || -> Result<(), HooksError> {
//!     let _part = part; // simulation only: this thread takes part in virtual time
//!     let stop = Stop::new(Some(there.now() + Duration::from_secs(30)), Cancel::default());
//!     let mut hooks = DestinationHooks::accept(listener.as_mut(), &DestinationConfig::default(), &stop)?;
//!     hooks.add_block(RamBlock::new("pc.ram", HostRegion::new(memory)))?;
//!     // Parse the stream until it names a block, then tell the hooks.
//!     let mut name = [0; 6];
//!     hooks.read_stream(&mut name, &stop)?;
//!     hooks.block_notification(std::str::from_utf8(&name).unwrap(), 2 << 20)?;
//!     // Each mark in the stream opens a round: setup, then pages.
//!     for _ in 0..2 {
//!         let mut mark = [0; 8];
//!         let mut done = 0;
//!         while done < mark.len() {
//!             done += hooks.read_stream(&mut mark[done..], &stop)?;
//!         }
//!         assert_eq!(u64::from_be_bytes(mark), HookMark::FLAG);
//!         hooks.registration_handle(&stop)?;
//!     }
//!     hooks.finish(&stop)?; // keys are dead from here on: the guest may run
//!     Ok(())
//! });
//!
//! let part = here.enter();
//! let stop = Stop::new(Some(here.now() + Duration::from_secs(30)), Cancel::default());
//! let mut hooks = SourceHooks::connect(&here, "10.0.0.2", 4444, SourceConfig::default(), &stop)?;
//! hooks.set_blocks(vec![RamBlock::new("pc.ram", HostRegion::new(ram_here.clone()))])?;
//! hooks.write_stream(b"pc.ram", &stop)?;
//!
//! for kind in [RamControl::Setup, RamControl::Finish] {
//!     if let Some(mark) = hooks.registration_start(kind)? {
//!         hooks.write_stream(&mark.to_bytes(), &stop)?;
//!     }
//!     if kind != RamControl::Setup {
//!         // Dirty bits are cleared before this call. Runs of pages, in address order.
//!         let all = BlockSpan { block: 0, offset: 0, len: 2 << 20, content: PageContent::Unknown };
//!         hooks.control_save_page(all, &stop)?;
//!     }
//!     hooks.registration_stop(kind, &stop)?;
//! }
//! hooks.finish(&stop)?;
//! drop(part);
//!
//! destination.join().unwrap()?;
//! assert_eq!(ram_here.first_difference(&ram_there), None);
//! # Ok(())
//! # }
//! ```

pub mod blocks;
pub mod capabilities;
mod channel;
pub mod chunk;
pub mod control;
mod counters;
pub mod exchange;
pub mod fabric;
pub mod hooks;
mod region;
pub mod sim;
pub mod stop;
mod stream;
pub mod tap;
pub mod verbs;

pub use blocks::{BlockError, RamBlock};
pub use capabilities::{Capabilities, Features, MigrationId};
pub use counters::Counters;
pub use fabric::{Fabric, FabricError};
pub use hooks::{
    Blame, BlockSpan, Delay, DestinationConfig, DestinationHooks, ExtensionOffer, HookMark, HooksError,
    PageContent, PeerFilter, READ_QUEUES, RamControl, ReadDone, ReadKey, ReadLane, Reason, ReturnReader,
    ReturnWriter, RoundSummary, SaveDisposition, SourceConfig, SourceHooks, Ticket,
};
pub use region::{HostRegion, OutOfRegion, RegionMemory};
pub use stop::{Cancel, Stop, Stopped};
pub use verbs::PinnedSpan;
