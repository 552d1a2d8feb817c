//! The IP addresses of a device's port: those of its network interfaces. A GID is one of them on RoCE alone: on
//! InfiniBand it is the port's own number, on iWARP a hardware address.
//!
//! # Source
//! Documentation/ABI/stable/sysfs-class-infiniband (`gid_attrs/ndevs`, `node_type`), sysfs-class-net (`dev_port`),
//! getifaddrs(3).

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::device::LinkLayer;

/// Names of the network interfaces that belong to port `number` of the device that the kernel describes in `folder`
/// (`/sys/class/infiniband/NAME`).
pub(super) fn interfaces(folder: &Path, number: u8, link_layer: LinkLayer) -> BTreeSet<String> {
    let names_in = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| entry.path()).collect::<Vec<_>>()
    };
    let read = |path: &Path| fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    // An entry of the table without an interface can't be read.
    let of_table = names_in(&folder.join(format!("ports/{number}/gid_attrs/ndevs")));
    let mut names: BTreeSet<String> = of_table.iter().filter_map(|path| read(path)).collect();
    if link_layer == LinkLayer::InfiniBand {
        // Its table knows no interface: those that carry IP over it are the device's own.
        let of_port =
            |path: &Path| read(&path.join("dev_port"))?.parse().ok().filter(|port: &u8| port + 1 == number);
        let own = names_in(&folder.join("device/net"));
        let named = own.iter().filter(|path| of_port(path).is_some()).filter_map(|path| path.file_name());
        names.extend(named.map(|name| name.to_string_lossy().into_owned()));
    }
    names.remove("");
    names
}

/// The addresses of a port: of its interfaces, or of its GIDs where the kernel names no interface and GIDs are addresses.
pub(super) fn addresses(
    folder: &Path,
    (number, link_layer): (u8, LinkLayer),
    gids: &[[u8; 16]],
    of_host: &[(String, IpAddr)],
) -> Vec<IpAddr> {
    let names = interfaces(folder, number, link_layer);
    let node = fs::read_to_string(folder.join("node_type")).unwrap_or_default();
    // 4 is an iWARP device, 1 a channel adapter: RoCE, where it is wired to Ethernet.
    let by_gid = names.is_empty() && link_layer == LinkLayer::Ethernet && !node.starts_with('4');
    let mut found: Vec<IpAddr> = match by_gid {
        true => gids.iter().map(|gid| Ipv6Addr::from(*gid).to_canonical()).collect(),
        false => {
            of_host.iter().filter(|(name, _)| names.contains(name)).map(|(_, address)| *address).collect()
        }
    };
    let mut seen = BTreeSet::new();
    found.retain(|address| seen.insert(*address));
    found
}

/// Every address of this host with its interface. Without an answer of the kernel: none.
pub(super) fn of_this_host() -> Vec<(String, IpAddr)> {
    let mut list = std::ptr::null_mut();
    // SAFETY: `list` is written on success only.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Vec::new();
    }
    let (mut found, mut at) = (Vec::new(), list);
    // SAFETY: a list of getifaddrs(3), which is freed below; its end is null.
    while let Some(entry) = unsafe { at.as_ref() } {
        at = entry.ifa_next;
        // SAFETY: an address, where there is one, is of the family that it begins with, and the kernel's own: aligned and
        // as long as that family's.
        let address =
            unsafe { entry.ifa_addr.as_ref() }.and_then(|address| match i32::from(address.sa_family) {
                libc::AF_INET => {
                    // SAFETY: as above.
                    let address = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in>() };
                    Some(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))))
                }
                libc::AF_INET6 => {
                    // SAFETY: as above.
                    let address = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in6>() };
                    Some(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)))
                }
                _ => None,
            });
        if let Some(address) = address {
            // SAFETY: the name is a C string of the same list.
            let name = unsafe { CStr::from_ptr(entry.ifa_name) };
            found.push((name.to_string_lossy().into_owned(), address));
        }
    }
    // SAFETY: the list that getifaddrs gave; nothing of it is referred to any more.
    unsafe { libc::freeifaddrs(list) };
    found
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// A device as the kernel describes it: entries of the GID table with their interfaces, interfaces of its own with
    /// their ports.
    fn device(node: &str, table: &[&str], own: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let put = |path: String, text: &str| {
            let path = folder.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{text}\n")).unwrap();
        };
        put("node_type".into(), node);
        table.iter().enumerate().for_each(|(at, name)| put(format!("ports/1/gid_attrs/ndevs/{at}"), name));
        own.iter().for_each(|(name, port)| put(format!("device/net/{name}/dev_port"), port));
        folder
    }

    fn found(folder: &tempfile::TempDir, link_layer: LinkLayer, gid: &str) -> Vec<String> {
        let host = [("eth0", "10.0.0.1"), ("ib0", "10.1.0.1"), ("ib1", "10.2.0.1"), ("eth0", "fe80::1")]
            .map(|(name, address)| (name.to_owned(), address.parse().unwrap()));
        let gid: Ipv6Addr = gid.parse().unwrap();
        let found = addresses(folder.path(), (1, link_layer), &[gid.octets()], &host);
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn addresses_are_those_of_the_ports_interfaces_and_no_gid_is_taken_for_one() {
        // RoCE: the interface of its table, each address once.
        let roce = device("1: CA", &["eth0", "eth0", ""], &[]);
        assert_eq!(found(&roce, LinkLayer::Ethernet, "::ffff:10.0.0.1"), ["10.0.0.1", "fe80::1"]);
        // iWARP: its GID is a hardware address, 02:00:0a:09:00:01 here.
        let iwarp = device("4: RNIC", &["eth0"], &[]);
        assert_eq!(found(&iwarp, LinkLayer::Ethernet, "200:a09:1::"), ["10.0.0.1", "fe80::1"]);
        let without = device("4: RNIC", &[], &[]);
        assert!(found(&without, LinkLayer::Ethernet, "200:a09:1::").is_empty());
        // InfiniBand: the interface of this port, not that of the second.
        let infiniband = device("1: CA", &[], &[("ib0", "0"), ("ib1", "1")]);
        assert_eq!(found(&infiniband, LinkLayer::InfiniBand, "fe80::2:c903:1"), ["10.1.0.1"]);
        assert!(found(&device("1: CA", &[], &[]), LinkLayer::InfiniBand, "fec0::1").is_empty());
        // A kernel that names no interface.
        let silent = device("1: CA", &[], &[]);
        assert_eq!(found(&silent, LinkLayer::Ethernet, "::ffff:10.0.0.9"), ["10.0.0.9"]);
    }

    #[test]
    fn this_host_has_the_loopbacks_address() {
        let loopback = ("lo".to_owned(), IpAddr::from([127, 0, 0, 1]));
        assert!(of_this_host().contains(&loopback), "{:?}", of_this_host());
    }
}
