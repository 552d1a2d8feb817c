//! The virtual machine as a migration sees it: its memory, its writes, and its control.

mod control;
mod dirty;
mod discards;
mod hints;
#[cfg(feature = "kvm")]
mod kvm;
mod mapped;
mod memory;
mod placing;
#[cfg(test)]
mod race;
#[cfg(all(test, feature = "kvm"))]
mod several_writers;
mod soft_dirty;
mod software;
mod sources;
#[cfg(any(test, feature = "testing"))]
pub mod synthetic;
#[cfg(any(test, feature = "testing"))]
mod testing;
mod vcpu_gate;
mod vcpu_threads;
mod vhost_log;
#[cfg(feature = "vm-memory")]
mod vm_memory;
mod write_protection;
mod written_pages;

pub use control::{DeviceState, GuestControl};
pub(crate) use control::{load_state, save_state, state_size};
pub use dirty::{DirtyError, DirtySource};
pub use discards::{DiscardManager, PlugMap};
#[cfg(test)]
pub(crate) use hints::HintBreakage;
pub use hints::{HintEpoch, HintError, Hinted, PageHints};
#[cfg(feature = "kvm")]
pub use kvm::{KvmDirtyLog, KvmDirtyRing, KvmSlot, RingSize};
pub use mapped::{GuestBuilder, MappedGuest};
pub(crate) use memory::span_of;
pub use memory::{GuestError, GuestMemory, LayoutChange};
pub(crate) use placing::CheckpointCache;
pub use placing::{CacheError, PageObserver, PageWriter, Placer, ServeError};
pub use soft_dirty::{PauseWriters, SoftDirty};
pub use software::SoftwareBitmap;
pub use sources::{Choice, NoSource, choose, sync_all};
#[cfg(any(test, feature = "testing"))]
pub use testing::TestMachine;
pub use vcpu_gate::VcpuGate;
pub use vcpu_threads::VcpuThreads;
pub use vhost_log::VhostLog;
pub(crate) use write_protection::WriteProtection;
pub use written_pages::WrittenPages;
