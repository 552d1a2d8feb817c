//! Which hosts may connect (`--allow`).

use std::collections::HashSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock};

use super::candidates::TellFn;
use crate::sys::Lock as _;

/// Networks whose hosts may connect; the default allows every host.
#[derive(Clone, Debug, Default)]
pub struct AllowList {
    networks: Vec<Network>,
    refused: Arc<Refused>,
}

impl PartialEq for AllowList {
    fn eq(&self, other: &Self) -> bool {
        self.networks == other.networks
    }
}

impl Eq for AllowList {}

/// Maximum number of hosts that are reported.
const TOLD: usize = 100;

/// Hosts whose connections were closed; each is reported once. Shared by all sockets of a listener.
#[derive(Default)]
pub(crate) struct Refused {
    told: Mutex<HashSet<IpAddr>>,
    tell: OnceLock<Arc<TellFn>>,
}

impl fmt::Debug for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Refused")
    }
}

impl Refused {
    /// Called for each host, the first time that its connection is closed.
    pub(crate) fn tell(&self, tell: Arc<TellFn>) {
        // A listener has one.
        let _ = self.tell.set(tell);
    }

    fn refuse(&self, host: IpAddr) {
        let mut told = self.told.locked();
        if told.len() > TOLD || !told.insert(host) {
            return;
        }
        let text = match told.len() {
            0..=TOLD => {
                format!("closed a connection from {host}, which is not among the hosts that may connect")
            }
            _ => format!("{TOLD} hosts that may not connect have tried; further ones are not reported"),
        };
        drop(told);
        tracing::warn!("{text}");
        if let Some(tell) = self.tell.get() {
            tell(&text);
        }
    }
}

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
        self.networks.is_empty() || self.networks.iter().any(|network| network.holds(host.to_canonical()))
    }

    /// As [`allows`](Self::allows), for a connection that is closed if not: reports its host.
    pub(crate) fn admits(&self, host: IpAddr) -> bool {
        let admitted = self.allows(host);
        if !admitted {
            self.refused.refuse(host.to_canonical());
        }
        admitted
    }

    /// The hosts that were refused by this list and its clones.
    pub(crate) fn refused(&self) -> Arc<Refused> {
        Arc::clone(&self.refused)
    }

    /// True if every host may connect.
    pub fn allows_all(&self) -> bool {
        self.networks.is_empty()
    }

    /// Adds the hosts of the other list. Adding an empty list to an empty one leaves it empty.
    pub fn extend(&mut self, other: Self) {
        self.networks.extend(other.networks);
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
        let networks = text.split(',').map(|part| part.trim().parse()).collect::<Result<_, _>>()?;
        Ok(Self { networks, refused: Arc::default() })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn each_refused_host_is_reported_once_and_only_so_many() {
        let list: AllowList = "10.0.0.0/8".parse().unwrap();
        let reports = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&reports);
        list.refused().tell(Arc::new(move |text: &str| kept.locked().push(text.to_owned())));
        let other = list.clone();
        for host in 0..200u8 {
            let host: IpAddr = [192, 0, 2, host].into();
            assert!(!list.admits(host) && !other.admits(host));
        }
        assert!(list.admits([10, 1, 1, 1].into()));
        let reports = reports.locked();
        assert_eq!(reports.len(), TOLD + 1, "{reports:?}");
        assert!(reports[0].contains("192.0.2.0") && reports[TOLD].contains("further ones"), "{reports:?}");
    }

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
