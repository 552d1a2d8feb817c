//! Which hosts may connect (`--allow`).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// Networks whose hosts may connect; the default allows every host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllowList(Vec<Network>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    base: IpAddr,
    prefix: u8,
}

/// Why a text is not a valid list of networks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AllowError {
    /// Not an address, optionally with a prefix length.
    #[error("`{text}` is not a network; write an address or ADDRESS/BITS, like 10.1.0.0/16")]
    NotANetwork {
        /// The given text.
        text: String,
    },
    /// The address has bits set beyond the prefix: one of the two is a mistake.
    #[error(
        "`{text}` has address bits beyond its prefix; write {network} for the network, or the address alone"
    )]
    HostBits {
        /// The given text.
        text: String,
        /// The network it lies in.
        network: String,
    },
}

impl AllowList {
    /// True if `host` may connect. An IPv4 host that connected to an IPv6 socket (`::ffff:10.0.0.1`) counts as its IPv4
    /// address.
    pub fn allows(&self, host: IpAddr) -> bool {
        self.0.is_empty() || self.0.iter().any(|network| network.holds(host.to_canonical()))
    }

    /// True if every host may connect.
    pub fn allows_all(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds the hosts of the other list. Adding an empty list to an empty one leaves it empty.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }
}

impl Network {
    fn holds(self, host: IpAddr) -> bool {
        match (self.base, host) {
            (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_)) => {
                masked(host, self.prefix) == self.base
            }
            _ => false,
        }
    }
}

fn masked(host: IpAddr, prefix: u8) -> IpAddr {
    match host {
        IpAddr::V4(host) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(host.to_bits() & mask))
        }
        IpAddr::V6(host) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6((host.to_bits() & mask).into())
        }
    }
}

impl FromStr for Network {
    type Err = AllowError;

    fn from_str(text: &str) -> Result<Self, AllowError> {
        let refused = || AllowError::NotANetwork { text: text.to_owned() };
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let base: IpAddr = address.parse().map_err(|_| refused())?;
        let most = if base.is_ipv4() { 32 } else { 128 };
        let prefix = match bits {
            None => most,
            Some(bits) if !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit()) => {
                bits.parse().ok().filter(|bits| *bits <= most).ok_or_else(refused)?
            }
            Some(_) => return Err(refused()),
        };
        let network = Self { base: masked(base, prefix), prefix };
        if network.base != base {
            return Err(AllowError::HostBits { text: text.to_owned(), network: network.to_string() });
        }
        Ok(network)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

/// A list with commas between the networks.
impl FromStr for AllowList {
    type Err = AllowError;

    fn from_str(text: &str) -> Result<Self, AllowError> {
        text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn hosts_are_held_against_every_network() {
        let list: AllowList = "10.1.0.0/16, 192.168.7.9,fd00::/8,::1".parse().unwrap();
        for (host, allowed) in [
            ("10.1.255.255", true),
            ("10.2.0.0", false),
            ("192.168.7.9", true),
            ("192.168.7.8", false),
            ("fdff::1", true),
            ("fe80::1", false),
            ("::1", true),
            ("::ffff:10.1.2.3", true),
            ("::ffff:10.2.2.3", false),
            ("127.0.0.1", false),
        ] {
            assert_eq!(list.allows(host.parse().unwrap()), allowed, "{host}");
        }
        let all: AllowList = "0.0.0.0/0,::/0".parse().unwrap();
        assert!(all.allows("1.2.3.4".parse().unwrap()) && all.allows("fe80::1".parse().unwrap()));
        let old: AllowList = "0.0.0.0/0".parse().unwrap();
        assert!(!old.allows("fe80::1".parse().unwrap()) && !old.allows_all());
        assert!(AllowList::default().allows("1.2.3.4".parse().unwrap()));
    }

    #[test]
    fn slips_are_refused_with_what_was_meant() {
        for text in ["", "10.0.0.0/33", "::/129", "10.0.0.0/", "10.0.0.0/+8", "host", "10.0.0.0/8,", "10/8"] {
            let error = text.parse::<AllowList>().unwrap_err();
            assert!(matches!(error, AllowError::NotANetwork { .. }), "{text}: {error}");
        }
        let error = "10.1.2.3/8".parse::<AllowList>().unwrap_err();
        assert!(error.to_string().contains("write 10.0.0.0/8"), "{error}");
    }
}
