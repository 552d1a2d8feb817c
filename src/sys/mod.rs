//! The kernel's interfaces, one a file, behind safe functions. This crate's only unsafe code.
#![allow(unsafe_code)]

#[cfg(test)]
pub(crate) mod blocked;
mod descriptors;
mod faults;
mod host_region;
#[cfg(feature = "kvm")]
mod kvm_dirty;
#[cfg(feature = "kvm")]
mod kvm_memory;
#[cfg(feature = "kvm")]
mod kvm_ring;
mod low_water;
mod mapping;
mod memory_file;
#[cfg(feature = "rdma")]
mod nic_region;
mod numa;
mod pagemap_scan;
mod parts;
mod random;
mod scan;
mod shared_bits;
mod sigpipe;
mod soft_dirty;
mod splice;
mod stop;
mod tcp_state;
#[cfg(test)]
pub(crate) mod testing;
mod threads;
mod uffd;
mod untouched;
#[cfg(feature = "vm-memory")]
mod vm_memory_region;
mod zerocopy;

pub use descriptors::{duplicate, take_inherited_fd};
pub use faults::{FaultWatch, process_page_faults, thread_page_faults};
pub use host_region::{HostRegion, HostSpan, OutOfRegion};
#[cfg(feature = "kvm")]
pub(crate) use kvm_dirty::KvmLog;
#[cfg(feature = "kvm")]
pub use kvm_memory::KvmMemory;
#[cfg(feature = "kvm")]
pub(crate) use kvm_ring::DirtyRing;
pub use low_water::set_low_water;
pub use mapping::{Mapping, MappingError, discard, populate};
pub use numa::{NumaNode, cpu_list, keep_to_cpus, node_of_address, nodes_of_pages, numa_nodes, own_cpus};
pub use pagemap_scan::Pagemap;
pub use parts::{FdKind, MAX_PARTS, RecvPart, SendPart, recv_parts, send_parts};
pub use random::random_id;
pub use scan::{is_zero, look_ahead, sweep};
pub use shared_bits::SharedBitmap;
pub use soft_dirty::SoftDirtyBits;
pub use splice::PagePipe;
pub use stop::{CancelToken, Stop, StopReason};
pub use tcp_state::{TcpState, queued_bytes, tcp_state};
pub use threads::{Job, SpawnFn, only_when_idle, spawn_thread};
pub use uffd::{UffdError, WriteProtector};
pub use zerocopy::{ZeroCopyReceipt, allow_zero_copy, zero_copy_receipt};
