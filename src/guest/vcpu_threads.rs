//! Which thread runs which vCPU, so that the time that vCPUs wait for missing pages can be told from that of other
//! threads.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::sys::{Lock as _, this_thread};

/// The threads of a guest's vCPUs. Clones are handles of the same list: an embedder gives one to
/// [`DestinationSettings::vcpu_threads`](crate::session::DestinationSettings::vcpu_threads), and each vCPU's thread
/// calls [`enter`](Self::enter) on another before it first touches guest memory. The kernel reports a fault with the
/// number of its thread; a fault that KVM handles asynchronously, on a thread of the kernel, is not the vCPU's.
#[derive(Clone, Debug, Default)]
pub struct VcpuThreads(Arc<Mutex<Threads>>);

#[derive(Debug, Default)]
struct Threads {
    /// vCPUs by the numbers of their threads.
    vcpus: BTreeMap<u32, u32>,
    /// Counts the changes.
    version: u64,
}

impl VcpuThreads {
    /// The calling thread runs this vCPU, from here on and in place of an earlier thread. QEMU's lists have their
    /// figures in the order of the numbers, which begin with 0.
    pub fn enter(&self, vcpu: u32) {
        self.set(vcpu, this_thread());
    }

    /// As [`enter`](Self::enter), for the thread that has this number in the kernel (gettid(2)).
    pub fn set(&self, vcpu: u32, thread: u32) {
        let mut threads = self.0.locked();
        threads.vcpus.retain(|_, known| *known != vcpu);
        threads.vcpus.insert(thread, vcpu);
        threads.version += 1;
    }

    /// The vCPU that a thread runs.
    pub(crate) fn vcpu_of(&self, thread: u32) -> Option<u32> {
        self.0.locked().vcpus.get(&thread).copied()
    }

    /// All vCPUs, if the list was changed after `version`, which is then the present one.
    pub(crate) fn changed(&self, version: &mut u64) -> Option<Vec<u32>> {
        let threads = self.0.locked();
        (std::mem::replace(version, threads.version) != threads.version)
            .then(|| threads.vcpus.values().copied().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_is_known_by_the_thread_that_runs_it_last() {
        let (vcpus, mut version) = (VcpuThreads::default(), 0);
        assert_eq!((vcpus.vcpu_of(7), vcpus.changed(&mut version)), (None, None));
        vcpus.set(1, 7);
        vcpus.set(0, 9);
        assert_eq!((vcpus.vcpu_of(7), vcpus.vcpu_of(9), vcpus.vcpu_of(8)), (Some(1), Some(0), None));
        assert_eq!(vcpus.changed(&mut version).map(|all| all.len()), Some(2));
        assert_eq!(vcpus.changed(&mut version), None);
        let other = vcpus.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| other.enter(1));
        });
        assert_eq!(vcpus.vcpu_of(7), None, "another thread runs it now");
        assert_eq!(vcpus.changed(&mut version).map(|all| all.len()), Some(2));
    }
}
