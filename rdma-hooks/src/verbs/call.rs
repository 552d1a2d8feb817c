//! Return values of the C libraries as results.

use std::io;

use crate::fabric::FabricError;

/// Turns a return value into a result. The libraries use three conventions: 0 or -1 with `errno`, 0 or a positive
/// errno, and (where a library or function is missing) a negative errno.
pub(super) fn check(returned: i32, verb: &'static str) -> Result<(), FabricError> {
    match returned {
        0 => Ok(()),
        -1 => Err(failed(verb, io::Error::last_os_error())),
        errno => Err(failed(verb, io::Error::from_raw_os_error(errno.saturating_abs()))),
    }
}

/// Turns a pointer into a result; null means failure with `errno`.
pub(super) fn check_ptr<T: ?Sized>(
    returned: *mut T,
    verb: &'static str,
) -> Result<std::ptr::NonNull<T>, FabricError> {
    std::ptr::NonNull::new(returned).ok_or_else(|| failed(verb, io::Error::last_os_error()))
}

fn failed(verb: &'static str, source: io::Error) -> FabricError {
    let remedy = match source.raw_os_error() {
        // The library is present and has queried all devices.
        Some(libc::ENODEV) if verb.starts_with("rdma_resolve") || verb.starts_with("rdma_bind") => {
            return FabricError::Unavailable {
                what: verb,
                remedy: "no RDMA device of this host has, or reaches, that address: use an address of a device at the \
                         destination (`rdma link` and `ip address` tell; a loopback address is none)",
                source,
            };
        }
        Some(libc::ENODEV | libc::ENOSYS | libc::EOPNOTSUPP) => {
            return FabricError::Unavailable {
                what: verb,
                remedy: "install rdma-core and load a device driver (rdma link add ... type rxe for soft-RoCE)",
                source,
            };
        }
        Some(libc::ENOENT) if verb == "rdma_create_event_channel" => {
            "there is no /dev/infiniband/rdma_cm: load the kernel's connection manager (modprobe rdma_ucm)"
        }
        Some(libc::EADDRNOTAVAIL) => "the address is not one of an RDMA device",
        Some(libc::EADDRINUSE) => "the port is taken",
        Some(libc::EACCES | libc::EPERM) => "the process needs access to /dev/infiniband",
        Some(libc::ENOMEM) => {
            "raise the limit on locked memory (ulimit -l), or the device is out of resources"
        }
        _ => "",
    };
    FabricError::Verb { verb, remedy, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn all_three_dialects_of_failure_keep_their_errno() {
        assert!(check(0, "v").is_ok());
        for returned in [libc::EINVAL, -libc::EINVAL] {
            let FabricError::Verb { verb: "v", source, .. } = check(returned, "v").unwrap_err() else {
                panic!()
            };
            assert_eq!(source.raw_os_error(), Some(libc::EINVAL));
        }
        assert!(matches!(check(-libc::EOPNOTSUPP, "v"), Err(FabricError::Unavailable { .. })));
    }

    #[test]
    fn an_address_without_a_device_is_not_taken_for_a_missing_library() {
        let said = |returned, verb| check(returned, verb).unwrap_err().to_string();
        for verb in ["rdma_resolve_addr", "rdma_bind_addr"] {
            let text = said(-libc::ENODEV, verb);
            assert!(text.contains("that address") && !text.contains("install"), "{text}");
            assert!(said(-libc::EOPNOTSUPP, verb).contains("install rdma-core"));
        }
    }
}
