//! The verbs device tests run on.

#![cfg(feature = "verbs")]

use std::net::Ipv6Addr;

use rdma_hooks::verbs::{PortState, devices};

/// The IPv4 address of an active device, or why there is none.
pub fn address() -> Result<String, String> {
    let devices = devices().map_err(|error| error.to_string())?;
    let ports = devices.iter().flat_map(|device| &device.ports);
    let active = ports.filter(|port| port.state == PortState::Active);
    let mut gids = active.flat_map(|port| &port.gids).map(|gid| Ipv6Addr::from(*gid));
    let ip = gids.find_map(|gid| gid.to_ipv4_mapped());
    ip.map(|ip| ip.to_string()).ok_or_else(|| "no device has an active port with an IPv4 address".to_owned())
}
