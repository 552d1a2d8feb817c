//! The kernel's interfaces, one in each file, wrapped in safe functions. This crate's only unsafe code.
#![allow(unsafe_code)]

mod async_write_protection;
#[cfg(test)]
pub(crate) mod blocked;
mod descriptor_passing;
mod descriptors;
mod handed_faults;
mod host_region;
#[cfg(feature = "kvm")]
mod kvm_dirty;
#[cfg(feature = "kvm")]
mod kvm_memory;
#[cfg(feature = "kvm")]
mod kvm_ring;
mod lock;
mod lost_memory;
mod low_water;
mod mapping;
mod memory_file;
mod memory_room;
mod minor_faults;
mod missing_faults;
#[cfg(feature = "rdma")]
mod nic_region;
mod numa;
mod page_contents;
mod page_out;
mod pagemap_scan;
mod peer;
mod placed_io;
mod random;
mod shared_bits;
mod shared_file;
mod sigpipe;
mod since_boot;
mod soft_dirty;
mod splice;
mod stop;
mod tcp_state;
#[cfg(test)]
pub(crate) mod testing;
mod threads;
mod untouched;
mod vectored_io;
#[cfg(feature = "vm-memory")]
mod vm_memory_region;
mod wake_event;
mod write_faults;
mod zero_scan;
mod zerocopy;

pub(crate) use async_write_protection::{UffdError, WriteProtector};
pub(crate) use descriptor_passing::{recv_with_descriptors, send_with_descriptor};
pub use descriptors::{duplicate, take_inherited_fd};
pub use handed_faults::{HandedEvent, HandedFaults, HandedFaultsError, Placement};
pub use host_region::{HostRegion, HostSpan, OutOfRegion};
#[cfg(feature = "kvm")]
pub(crate) use kvm_dirty::KvmLog;
#[cfg(feature = "kvm")]
pub use kvm_memory::KvmMemory;
#[cfg(feature = "kvm")]
pub(crate) use kvm_ring::DirtyRing;
pub(crate) use lock::Lock;
pub use lost_memory::{Loss, survive_lost_memory};
pub(crate) use low_water::set_low_water;
#[cfg(test)]
pub(crate) use mapping::lock;
pub use mapping::{Mapping, MappingError, discard, populate};
pub(crate) use mapping::{discard_in, is_there, populate_read, set_huge_pages};
pub use memory_room::{MemoryBound, MemoryRoom, memory_room};
pub(crate) use minor_faults::MinorFaultMonitor;
#[cfg(test)]
pub(crate) use minor_faults::thread_page_faults;
pub use missing_faults::{FaultAt, MissingFault, MissingFaults, MissingFaultsError};
pub(crate) use numa::{NumaNode, cpu_list, node_of_address};
pub use numa::{nodes_of_pages, numa_nodes, own_cpus, set_cpu_affinity};
pub(crate) use page_contents::PageContents;
pub use page_out::page_out;
pub(crate) use pagemap_scan::Pagemap;
pub use peer::{PeerProcess, peer_process};
pub(crate) use placed_io::{cached_bytes, read_at, write_at};
pub(crate) use random::random_id;
pub(crate) use shared_bits::SharedBitmap;
pub use shared_file::{SharedFile, SharedFileError};
pub(crate) use since_boot::since_boot;
pub(crate) use soft_dirty::SoftDirtyBits;
pub(crate) use splice::PagePipe;
pub use stop::{CancelToken, Stop, StopReason};
pub(crate) use tcp_state::{TcpState, queued_bytes, tcp_state};
pub use threads::{Job, SpawnFn, spawn_thread};
pub(crate) use threads::{only_when_idle, this_thread};
pub use untouched::release_zeros;
pub(crate) use vectored_io::{FdKind, MAX_PARTS, recv_parts, send_parts};
pub use vectored_io::{RecvPart, SendPart};
pub(crate) use wake_event::WakeEvent;
pub(crate) use write_faults::WriteFaults;
pub use write_faults::WriteFaultsError;
pub use zero_scan::is_zero;
pub(crate) use zero_scan::look_ahead;
pub(crate) use zerocopy::{ZeroCopyReceipt, allow_zero_copy, zero_copy_receipt};
