//! NUMA: which processors and memory are near each other, and where threads, pages and network devices are.
//!
//! # Source
//! The kernel's admin-guide/mm/numaperf and Documentation/ABI/stable/sysfs-devices-node; sched_setaffinity(2),
//! move_pages(2), getifaddrs(3).

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Processors and the memory near them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// The kernel's number.
    pub number: u32,
    /// Its processors, ascending.
    pub cpus: Vec<u32>,
}

/// The nodes of this machine that have processors, by number; empty if the kernel does not report them.
pub fn numa_nodes() -> Vec<NumaNode> {
    nodes_in(Path::new("/sys/devices/system/node"))
}

fn nodes_in(folder: &Path) -> Vec<NumaNode> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let node = |entry: std::fs::DirEntry| {
        let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
        let cpus = cpu_list(&std::fs::read_to_string(entry.path().join("cpulist")).ok()?)?;
        (!cpus.is_empty()).then_some(NumaNode { number, cpus })
    };
    let mut nodes: Vec<_> = entries.filter_map(node).collect();
    nodes.sort_by_key(|node| node.number);
    nodes
}

/// Reads numbers as the kernel writes them: `0-3,8`. `None` for anything else.
pub(crate) fn cpu_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus = Vec::new();
    for part in text.trim().split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        // More than a kernel can have would only waste memory.
        if last < first || last as usize >= CpuSet::MAX_CPU {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

/// Processors that the calling thread may run on.
///
/// # Errors
/// EINVAL on a machine with more than 1024 processors.
pub fn own_cpus() -> io::Result<Vec<u32>> {
    let set = sched_getaffinity(None)?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).map(|cpu| cpu as u32).collect())
}

/// From here on the calling thread runs only on those of `cpus` that it may run on already. `false`, without a change,
/// if there is none: the thread was started with another affinity.
///
/// # Errors
/// The error of sched_setaffinity(2); EPERM from a seccomp filter.
pub fn set_cpu_affinity(cpus: &[u32]) -> io::Result<bool> {
    let mut set = CpuSet::new();
    own_cpus()?.into_iter().filter(|cpu| cpus.contains(cpu)).for_each(|cpu| set.set(cpu as usize));
    if set.count() == 0 {
        return Ok(false);
    }
    sched_setaffinity(None, &set)?;
    Ok(true)
}

/// The node of each page of this process at `addresses`; `None` for one that is not in memory. No page is touched.
///
/// # Errors
/// ENOSYS in a kernel without NUMA; the error of move_pages(2).
pub fn nodes_of_pages(addresses: &[usize]) -> io::Result<Vec<Option<u32>>> {
    let mut status = vec![0i32; addresses.len()];
    let no_nodes: *const i32 = std::ptr::null();
    // SAFETY: without nodes the call moves nothing: it reads `addresses`, which name pages and need not be mapped, and
    // writes as many numbers to `status`.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            addresses.len(),
            addresses.as_ptr(),
            no_nodes,
            status.as_mut_ptr(),
            0,
        )
    };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(status.into_iter().map(|node| u32::try_from(node).ok()).collect())
}

/// The node of the network device that has the address `ip`, if it has one.
pub(crate) fn node_of_address(ip: IpAddr) -> Option<u32> {
    let device = Path::new("/sys/class/net").join(interface_of(ip)?).join("device");
    // A virtio device itself has no node, but its PCI device has one.
    let read = |path: &str| std::fs::read_to_string(device.join(path)).ok()?.trim().parse().ok();
    read("numa_node").or_else(|| read("../numa_node"))
}

fn interface_of(ip: IpAddr) -> Option<String> {
    let mut list = std::ptr::null_mut();
    // SAFETY: getifaddrs writes one pointer, to a list that is freed below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return None;
    }
    let mut at = list;
    let mut found = None;
    // SAFETY: the list is getifaddrs's own until freeifaddrs: each entry is null or whole.
    while let Some(entry) = unsafe { at.as_ref() } {
        // SAFETY: as above; an address is null or as long as its family requires.
        if unsafe { address_of(entry.ifa_addr) } == Some(ip) {
            // SAFETY: each entry has a name that ends with a zero.
            found = unsafe { CStr::from_ptr(entry.ifa_name) }.to_str().ok().map(str::to_owned);
            break;
        }
        at = entry.ifa_next;
    }
    // SAFETY: the list from above, once; `found` is a copy.
    unsafe { libc::freeifaddrs(list) };
    found
}

/// # Safety
/// `address` is null or points to a socket address that is as long as its family requires.
unsafe fn address_of(address: *const libc::sockaddr) -> Option<IpAddr> {
    // SAFETY: the caller's promise; reads are unaligned because the pointer's type promises little.
    unsafe {
        match i32::from(address.as_ref()?.sa_family) {
            libc::AF_INET => {
                let address = address.cast::<libc::sockaddr_in>().read_unaligned();
                Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))))
            }
            libc::AF_INET6 => {
                let address = address.cast::<libc::sockaddr_in6>().read_unaligned();
                Some(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::sys::Mapping;

    #[test]
    fn nodes_are_read_as_the_kernel_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        for (node, cpus) in [("node10", "4-5,7\n"), ("node2", "0-1\n"), ("node3", "\n"), ("power", "1\n")] {
            std::fs::create_dir(folder.path().join(node)).unwrap();
            std::fs::write(folder.path().join(node).join("cpulist"), cpus).unwrap();
        }
        std::fs::write(folder.path().join("online"), "2-3,10\n").unwrap();
        let nodes = nodes_in(folder.path());
        let expected = [(2, vec![0, 1]), (10, vec![4, 5, 7])];
        assert_eq!(nodes, expected.map(|(number, cpus)| NumaNode { number, cpus }));
        assert!(nodes_in(&folder.path().join("none")).is_empty());
        for wrong in ["x", "3-1", "1-", "0-4294967295", "-1"] {
            assert_eq!(cpu_list(wrong), None, "{wrong}");
        }
    }

    /// Runs in a thread of its own: the affinity stays until the thread ends.
    #[test]
    fn a_thread_keeps_to_processors_that_it_may_run_on() {
        let thread = std::thread::spawn(|| {
            let before = own_cpus().unwrap();
            assert!(!set_cpu_affinity(&[1023]).unwrap(), "processors that nobody has");
            assert_eq!(own_cpus().unwrap(), before);
            let last = before[before.len() - 1];
            assert!(set_cpu_affinity(&[last, 1023]).unwrap());
            assert_eq!(own_cpus().unwrap(), [last]);
            if before.len() > 1 {
                assert!(!set_cpu_affinity(&before[..1]).unwrap(), "not where it may not run any more");
            }
        });
        thread.join().unwrap();
    }

    #[test]
    fn a_page_has_a_node_once_it_is_touched() {
        let memory = Mapping::anonymous(2 * 4096).unwrap();
        memory.region().span(0, 1).unwrap().copy_from(&[1]);
        let start = memory.region().address();
        match nodes_of_pages(&[start, start + 4096]) {
            Ok(nodes) => assert!(nodes[0].is_some() && nodes[1].is_none(), "{nodes:?}"),
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSYS), "a kernel without NUMA"),
        }
    }

    #[test]
    fn the_loopback_is_an_interface_without_a_node() {
        let lo = IpAddr::V4(Ipv4Addr::LOCALHOST);
        assert_eq!(interface_of(lo).as_deref(), Some("lo"));
        assert_eq!((node_of_address(lo), interface_of("192.0.2.1".parse().unwrap())), (None, None));
    }
}
