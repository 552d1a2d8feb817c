//! The verbs device tests run on.

#![cfg(feature = "verbs")]

use std::net::Ipv6Addr;

use rdma_hooks::verbs::{PortState, devices};

/// The IPv4 address of an active device, or `None` (said aloud) without one. With `RDMA_HOOKS_NEED_DEVICE` set, a
/// missing device is a failure.
pub fn address() -> Option<String> {
    let found = devices().map(|devices| {
        let ports = devices.iter().flat_map(|device| &device.ports);
        let active = ports.filter(|port| port.state == PortState::Active);
        let mut gids = active.flat_map(|port| &port.gids).map(|gid| Ipv6Addr::from(*gid));
        gids.find_map(|gid| gid.to_ipv4_mapped()).map(|ip| ip.to_string())
    });
    let why = match found {
        Ok(Some(address)) => return Some(address),
        Ok(None) => "no device has an active port with an IPv4 address".to_owned(),
        Err(error) => error.to_string(),
    };
    assert!(std::env::var_os("RDMA_HOOKS_NEED_DEVICE").is_none(), "{why}");
    println!("skipped: {why}");
    None
}
