//! How much memory this process can still allocate: limited by the machine and by its control groups.
//!
//! # Source
//! proc(5) (`MemAvailable`, /proc/PID/cgroup); the kernel's admin-guide/cgroup-v2 (`memory.max`, `memory.current`,
//! `inactive_file` of `memory.stat`) and cgroup-v1/memory (`memory.limit_in_bytes`, `memory.usage_in_bytes`).

use std::fmt;
use std::fs;
use std::path::Path;

/// Available memory, and its limit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryRoom {
    /// Approximate number of bytes: other processes allocate and free memory meanwhile.
    pub bytes: u64,
    /// The limit that is reached first.
    pub bound: MemoryBound,
}

/// A limit on the memory of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryBound {
    /// The memory of the machine.
    Machine,
    /// The limit of a control group, by its path.
    ControlGroup(String),
}

impl fmt::Display for MemoryBound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine => f.write_str("of this machine's memory"),
            Self::ControlGroup(path) => write!(f, "under the memory limit of control group {path}"),
        }
    }
}

/// Memory that this process can still allocate. `None` if /proc does not report it.
///
/// A VMM calls this before it creates the memory of an incoming guest: `mmap(2)` itself allocates no pages yet, and the
/// out-of-memory killer ends a process for pages that it touches later. Huge pages of hugetlbfs are reserved
/// separately.
pub fn memory_room() -> Option<MemoryRoom> {
    room_under(Path::new("/"))
}

fn room_under(root: &Path) -> Option<MemoryRoom> {
    let read = |path: &str| fs::read_to_string(root.join(path.trim_start_matches('/'))).ok();
    let info = read("/proc/meminfo")?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    let machine = MemoryRoom { bytes: kib * 1024, bound: MemoryBound::Machine };
    let groups = read("/proc/self/cgroup").unwrap_or_default();
    let groups = groups.lines().flat_map(|line| groups_of(line, &read));
    groups.chain([machine]).min_by_key(|room| room.bytes)
}

/// What each control group of a line of /proc/self/cgroup still allows: the process's own group and its ancestors.
fn groups_of(line: &str, read: &impl Fn(&str) -> Option<String>) -> Vec<MemoryRoom> {
    let mut fields = line.splitn(3, ':').skip(1);
    let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { return Vec::new() };
    let (base, limit, usage) = match controllers {
        "" => ("/sys/fs/cgroup", "memory.max", "memory.current"),
        _ if controllers.split(',').any(|name| name == "memory") => {
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
        }
        _ => return Vec::new(),
    };
    let left = |group: &Path| {
        let number =
            |name: &str| read(&format!("{base}/{}/{name}", group.display()))?.trim().parse::<u64>().ok();
        let (limit, used) = (number(limit)?, number(usage)?);
        // Pages of files that were not used lately are reclaimed first.
        let stat = read(&format!("{base}/{}/memory.stat", group.display())).unwrap_or_default();
        let names = ["inactive_file ", "total_inactive_file "];
        let cached = stat.lines().filter_map(|line| names.iter().find_map(|name| line.strip_prefix(name)));
        let cached = cached.filter_map(|bytes| bytes.trim().parse::<u64>().ok()).max().unwrap_or(0);
        let bytes = limit.saturating_sub(used.saturating_sub(cached));
        let path = format!("/{}", group.display());
        Some(MemoryRoom { bytes, bound: MemoryBound::ControlGroup(path) })
    };
    Path::new(path.trim_start_matches('/')).ancestors().filter_map(left).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn put(root: &Path, path: &str, text: &str) {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn the_tightest_bound_counts() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        assert_eq!(room_under(root), None);
        put(root, "proc/meminfo", "MemTotal:  9000 kB\nMemAvailable:       8000 kB\n");
        let machine = room_under(root).unwrap();
        assert_eq!((machine.bytes, machine.bound), (8000 * 1024, MemoryBound::Machine));
        put(root, "proc/self/cgroup", "9:pids:/x\n4:memory:/a/b\n0::/vm/one\n");
        // This group has no limit of its own; its parent allows 3 MB, of which 1 MB is reclaimable cache.
        put(root, "sys/fs/cgroup/vm/one/memory.max", "max\n");
        put(root, "sys/fs/cgroup/vm/one/memory.current", "7\n");
        put(root, "sys/fs/cgroup/vm/memory.max", "5000000\n");
        put(root, "sys/fs/cgroup/vm/memory.current", "3000000\n");
        put(root, "sys/fs/cgroup/vm/memory.stat", "anon 1\ninactive_file 1000000\n");
        let group = room_under(root).unwrap();
        assert_eq!(
            (group.bytes, group.bound.to_string()),
            (3_000_000, MemoryBound::ControlGroup("/vm".into()).to_string())
        );
        put(root, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "2000000\n");
        put(root, "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes", "2500000\n");
        let group = room_under(root).unwrap();
        assert_eq!((group.bytes, group.bound), (0, MemoryBound::ControlGroup("/a/b".into())));
    }

    #[test]
    fn this_machine_tells() {
        assert!(memory_room().unwrap().bytes > 1 << 20);
    }
}
