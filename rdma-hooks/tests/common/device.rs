//! The verbs device tests run on.

#![cfg(feature = "verbs")]

use rdma_hooks::verbs::first_address;

/// The address of an active device, or why there is none.
pub fn address() -> Result<String, String> {
    let found = first_address().map_err(|error| error.to_string())?;
    let none = |devices| format!("no device has an active port with an IP address: {devices:?}");
    found.map(|ip| ip.to_string()).map_err(none)
}
