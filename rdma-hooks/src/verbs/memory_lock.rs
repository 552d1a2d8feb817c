//! How much memory the process may lock; registering memory needs it.

use std::fs;

use crate::fabric::FabricError;

/// The user namespace that a machine boots in (`PROC_USER_INIT_INO` of linux/proc_ns.h). The kernel checks CAP_IPC_LOCK
/// in this namespace: the capability in another namespace, as in a container, does not lift the limit.
const FIRST_USER_NAMESPACE: &str = "user:[4026531837]";

/// Bit of CAP_IPC_LOCK in a capability set, which lifts the limit.
const CAP_IPC_LOCK: u32 = 14;

/// The process's right to lock memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryLock {
    /// The soft limit in bytes; `None` for none.
    pub limit_bytes: Option<u64>,
    /// CAP_IPC_LOCK is in effect: the limit does not count.
    pub is_lifted: bool,
}

impl MemoryLock {
    /// # Errors
    ///
    /// [`FabricError::MemoryLock`] if `bytes` cannot be locked.
    pub fn check(self, bytes: u64) -> Result<(), FabricError> {
        match self.limit_bytes {
            Some(limit) if !self.is_lifted && bytes > limit => {
                Err(FabricError::MemoryLock { needed: bytes, limit })
            }
            _ => Ok(()),
        }
    }
}

/// Reads the calling process's limit (`Max locked memory`) and capabilities. A value that cannot be read counts as no
/// limit.
pub fn memory_lock() -> MemoryLock {
    let limits = fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let namespace = fs::read_link("/proc/self/ns/user").unwrap_or_default();
    MemoryLock {
        limit_bytes: soft_limit(&limits),
        is_lifted: is_lifted(&status, &namespace.to_string_lossy()),
    }
}

fn soft_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max locked memory"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// `namespace` is empty if /proc does not show it.
fn is_lifted(status: &str, namespace: &str) -> bool {
    has_capability(status, CAP_IPC_LOCK) && (namespace.is_empty() || namespace == FIRST_USER_NAMESPACE)
}

fn has_capability(status: &str, bit: u32) -> bool {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).is_some_and(|set| set >> bit & 1 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_counts_unless_the_capability_lifts_it() {
        let limits =
            "Limit  Soft  Hard  Units\nMax locked memory         65536                8388608   bytes\n";
        assert_eq!(soft_limit(limits), Some(65536));
        assert_eq!(soft_limit("Max locked memory   unlimited  unlimited bytes"), None);
        assert!(has_capability("CapEff:\t000001ffffffffff\n", CAP_IPC_LOCK));
        assert!(!has_capability("CapEff:\t00000000a80425fb\n", CAP_IPC_LOCK));
        let all = "CapEff:\t000001ffffffffff\n";
        assert!(is_lifted(all, FIRST_USER_NAMESPACE) && is_lifted(all, ""));
        assert!(!is_lifted(all, "user:[4026532281]"), "a container's");
        let limited = MemoryLock { limit_bytes: Some(65536), is_lifted: false };
        assert!(limited.check(65536).is_ok());
        assert!(matches!(limited.check(65537), Err(FabricError::MemoryLock { needed: 65537, limit: 65536 })));
        assert!(MemoryLock { is_lifted: true, ..limited }.check(u64::MAX).is_ok());
    }
}
