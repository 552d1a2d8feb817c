//! Which of this host's IP addresses are a device's.
//!
//! A GID does not show it: on InfiniBand it is built from the port's GUID, on iWARP it is a hardware address, and with
//! RoCE it may be the address of an interface in another network namespace. The connection manager shows it: an id
//! bound to an address has the device and port that connections of that address use.
//!
//! # Source
//!
//! Manual pages `rdma_bind_addr(3)`, `rdma_cm(7)`, `getifaddrs(3)`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ptr;

use super::cm::Id;
use super::device::{DeviceList, PortState, device_name, port_state};
use crate::fabric::FabricError;

/// An address of this host, and the port of a device that it is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BoundAddress {
    pub(super) ip: IpAddr,
    /// The device's name.
    pub(super) device: String,
    /// Counted from 1.
    pub(super) port: u8,
    pub(super) state: PortState,
}

/// The IP address of a device that carries traffic, preferring IPv4, which every QEMU accepts. `Err` inside the result:
/// the names of all devices, none of which has such an address.
///
/// # Errors
///
/// [`FabricError`] if there is no library or no device, or the connection manager or the list of addresses is not
/// available.
pub fn first_address() -> Result<Result<IpAddr, Vec<String>>, FabricError> {
    let devices = DeviceList::get()?;
    let found = first_active(local_addresses()?, bind)?;
    Ok(found.map(|bound| bound.ip).ok_or_else(|| devices.entries().map(device_name).collect()))
}

/// All addresses of this host that are a device's, IPv4 ones first.
///
/// # Errors
///
/// As [`first_address`].
pub(super) fn bound_addresses() -> Result<Vec<BoundAddress>, FabricError> {
    bound(candidates(local_addresses()?), bind).collect()
}

/// The addresses of one port.
pub(super) fn of_port(bound: &[BoundAddress], device: &str, port: u8) -> Vec<IpAddr> {
    let here = bound.iter().filter(|bound| bound.device == device && bound.port == port);
    here.map(|bound| bound.ip).collect()
}

/// Stops at the first match: each device that is found takes milliseconds to open.
fn first_active(
    local: Vec<IpAddr>,
    bind: impl FnMut(IpAddr) -> Result<Option<BoundAddress>, FabricError>,
) -> Result<Option<BoundAddress>, FabricError> {
    let is_active = |found: &Result<BoundAddress, _>| match found {
        Ok(bound) => bound.state == PortState::Active,
        Err(_) => true,
    };
    bound(candidates(local), bind).find(is_active).transpose()
}

fn bound(
    candidates: Vec<IpAddr>,
    mut bind: impl FnMut(IpAddr) -> Result<Option<BoundAddress>, FabricError>,
) -> impl Iterator<Item = Result<BoundAddress, FabricError>> {
    candidates.into_iter().filter_map(move |ip| bind(ip).transpose())
}

/// The addresses by which another host may reach this one: no loopback, and no IPv6 link-local address, which does not
/// identify an interface by itself.
fn candidates(mut local: Vec<IpAddr>) -> Vec<IpAddr> {
    local.retain(|ip| match ip.to_canonical() {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_unspecified(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unspecified() && !v6.is_unicast_link_local(),
    });
    local.sort_by_key(IpAddr::is_ipv6);
    // An address may be on several interfaces; the kernel chooses by the address alone.
    let mut seen = std::collections::HashSet::new();
    local.retain(|ip| seen.insert(*ip));
    local
}

/// Binds a new id to the address: an id that failed to bind keeps the interface of that attempt.
fn bind(ip: IpAddr) -> Result<Option<BoundAddress>, FabricError> {
    let id = Id::new()?;
    if let Err(error) = id.bind(SocketAddr::new(ip, 0)) {
        // No device has it.
        tracing::trace!(%ip, %error, "not the address of an RDMA device");
        return Ok(None);
    }
    let Ok(context) = id.verbs() else { return Ok(None) };
    let port = id.port();
    // SAFETY: the id is alive, so its context is open; a context has a device.
    let device = std::ptr::NonNull::new(unsafe { context.as_ref().device });
    let device = device.map(device_name).unwrap_or_default();
    // A device whose query fails must not hide the others.
    Ok(port_state(context, port).ok().map(|state| BoundAddress { ip, device, port, state }))
}

/// The addresses of this network namespace's interfaces, in the kernel's order.
fn local_addresses() -> Result<Vec<IpAddr>, FabricError> {
    let mut list = ptr::null_mut();
    // SAFETY: getifaddrs writes one pointer, to a list that is given back below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        let source = io::Error::last_os_error();
        let remedy = "name an address of a device instead";
        return Err(FabricError::Verb { verb: "getifaddrs", remedy, source });
    }
    let (mut at, mut found) = (list, Vec::new());
    // SAFETY: the list is getifaddrs's own until freeifaddrs: each entry is null or whole.
    while let Some(entry) = unsafe { at.as_ref() } {
        // SAFETY: as above; an address is null or as long as its family requires.
        found.extend(unsafe { ip_of(entry.ifa_addr) });
        at = entry.ifa_next;
    }
    // SAFETY: the list from above, once; `found` is a copy.
    unsafe { libc::freeifaddrs(list) };
    Ok(found)
}

/// # Safety
/// `address` is null or points to a socket address that is as long as its family requires.
unsafe fn ip_of(address: *const libc::sockaddr) -> Option<IpAddr> {
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

    /// The connection manager's answers on a host with a device of each kind: the addresses of an IPoIB and of an iWARP
    /// interface, neither of which is a GID, and that of a soft-RoCE interface.
    const HOST: [(&str, &str, u8, PortState); 6] = [
        ("10.3.0.1", "mlx5_0", 2, PortState::Inactive(1)),
        ("fd01::1", "mlx5_0", 1, PortState::Active),
        ("10.1.0.1", "mlx5_0", 1, PortState::Active),
        ("10.2.0.1", "siw0", 1, PortState::Active),
        ("10.9.0.1", "rxe0", 1, PortState::Active),
        ("10.9.1.1", "rxe0", 1, PortState::Active),
    ];

    fn ips(texts: &[&str]) -> Vec<IpAddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn bind_here(ip: IpAddr) -> Result<Option<BoundAddress>, FabricError> {
        let found = HOST.iter().find(|(text, ..)| ip == text.parse::<IpAddr>().unwrap());
        Ok(found.map(|&(_, device, port, state)| BoundAddress { ip, device: device.into(), port, state }))
    }

    #[test]
    fn each_port_has_the_addresses_that_are_bound_to_it_whatever_its_gids() {
        let others = ["127.0.0.1", "192.0.2.1", "::1", "fe80::1"];
        let local: Vec<&str> = others.into_iter().chain(HOST.map(|(ip, ..)| ip)).collect();
        let found: Result<Vec<_>, _> = bound(candidates(ips(&local)), bind_here).collect();
        let found = found.unwrap();
        for (device, port, expected) in [
            ("mlx5_0", 1, &["10.1.0.1", "fd01::1"][..]),
            ("mlx5_0", 2, &["10.3.0.1"]),
            ("siw0", 1, &["10.2.0.1"]),
            ("rxe0", 1, &["10.9.0.1", "10.9.1.1"]),
            ("rxe1", 1, &[]),
        ] {
            assert_eq!(of_port(&found, device, port), ips(expected), "{device} port {port}");
        }
    }

    #[test]
    fn the_first_address_is_one_of_an_active_port_ipv4_before_ipv6() {
        for (local, first, asked) in [
            (
                &["127.0.0.1", "192.0.2.1", "fe80::1", "fd01::1", "10.3.0.1", "10.2.0.1", "10.9.0.1"][..],
                Some("10.2.0.1"),
                3,
            ),
            (&["fd01::1", "10.1.0.1"], Some("10.1.0.1"), 1),
            (&["fd01::1", "192.0.2.1", "192.0.2.1"], Some("fd01::1"), 2),
            (&["127.0.0.1", "::1", "::ffff:127.0.0.1", "fe80::1"], None, 0),
            (&["10.3.0.1"], None, 1),
        ] {
            let mut count = 0;
            let counted = |ip| {
                count += 1;
                bind_here(ip)
            };
            let found = first_active(ips(local), counted).unwrap();
            assert_eq!(found.map(|bound| bound.ip.to_string()).as_deref(), first, "{local:?}");
            assert_eq!(count, asked, "addresses asked for: {local:?}");
        }
    }

    #[test]
    fn a_connection_manager_that_cannot_be_had_is_an_error_and_not_a_host_without_addresses() {
        let refuse =
            |_| Err(FabricError::Unavailable { what: "x", remedy: "", source: io::ErrorKind::Other.into() });
        let found = first_active(ips(&["192.0.2.1", "10.9.0.1"]), refuse);
        assert!(matches!(found, Err(FabricError::Unavailable { what: "x", .. })), "{found:?}");
    }

    #[test]
    fn the_loopback_is_among_this_hosts_addresses() {
        assert!(local_addresses().unwrap().contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)));
    }
}
