//! How a peer writes its stream.
//!
//! What a QEMU writes and accepts depends on its *machine type*, not on its version, and the stream does not announce
//! it. There are four settings of the sender. Receivers need none of them: they detect the differences.

use std::fmt;
use std::str::FromStr;

use super::incoming::Seen;

/// How to write for a peer, or how a peer writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PeerStyle {
    /// Send SWITCHOVER_START before the last part. A peer that does not support it fails.
    pub switchover_start: bool,
    /// The barrier of the multifd channels.
    pub barrier: BarrierStyle,
    /// Where zero pages go when there are multifd channels.
    pub zero_pages: ZeroPageStyle,
    /// When the postcopy preempt channel is opened, and how it ends.
    pub preempt: PreemptStyle,
}

/// The barrier of the multifd channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarrierStyle {
    /// Every end of a ram section.
    PerSection,
    /// Every MULTIFD_FLUSH record.
    PerRound,
}

/// Where zero pages go when there are multifd channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ZeroPageStyle {
    /// As records on the main channel. Every receiver takes them.
    Main,
    /// Listed in multifd packets. A receiver that does not support this loses them silently.
    Multifd,
}

/// When the postcopy preempt channel is opened, and how it ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PreemptStyle {
    /// Right after the main channel; it ends with an end-of-section record.
    Early,
    /// At the switchover; it ends when it is closed.
    Late,
}

impl PeerStyle {
    /// QEMU 7.2, and machine types up to 7.2 of any later one.
    pub const QEMU_7_2: Self = Self {
        switchover_start: false,
        barrier: BarrierStyle::PerSection,
        zero_pages: ZeroPageStyle::Main,
        preempt: PreemptStyle::Early,
    };

    /// QEMU 10.0 with its newest or an unversioned machine type.
    pub const QEMU_10_0: Self = Self {
        switchover_start: true,
        barrier: BarrierStyle::PerRound,
        zero_pages: ZeroPageStyle::Multifd,
        preempt: PreemptStyle::Late,
    };

    /// Another ramwire, which reads every style and receives the newest one.
    pub const RAMWIRE: Self = Self::QEMU_10_0;

    /// The style of a machine type of version `major.minor`.
    pub fn of_version(major: u32, minor: u32) -> Self {
        let after = |version| (major, minor) > version;
        Self {
            switchover_start: after((9, 2)),
            barrier: if after((8, 0)) { BarrierStyle::PerRound } else { BarrierStyle::PerSection },
            zero_pages: if after((8, 2)) { ZeroPageStyle::Multifd } else { ZeroPageStyle::Main },
            preempt: if after((7, 2)) { PreemptStyle::Late } else { PreemptStyle::Early },
        }
    }

    /// The style of a machine name such as `pc-i440fx-7.2` or `virt-9.0`; `None` for unversioned machines (`microvm`,
    /// `none`), whose name does not show it.
    pub fn of_machine(name: &str) -> Option<Self> {
        let (major, minor) = name.split('-').rev().find_map(version_of)?;
        Some(Self::of_version(major, minor))
    }

    /// The style of a source, from its machine name or, if the name does not show it, from its stream so far.
    ///
    /// `None` if neither shows it: then no SWITCHOVER_START and zero pages on the main channel are safe, and multifd or
    /// preempt need a configured style.
    pub fn of_source(machine: &str, seen: &Seen) -> Option<Self> {
        if let Some(style) = Self::of_machine(machine) {
            return Some(style);
        }
        if seen.switchover_start {
            return Some(Self::QEMU_10_0);
        }
        // A barrier record without SWITCHOVER_START: after 8.0, before 10.0. Zero pages on main are always safe.
        (seen.barrier_in_start == Some(true)).then(|| Self::of_version(8, 1))
    }
}

fn version_of(part: &str) -> Option<(u32, u32)> {
    let mut numbers = part.split('.');
    let major = numbers.next()?.parse().ok()?;
    let minor = numbers.next()?.parse().ok()?;
    numbers.all(|rest| rest.parse::<u32>().is_ok()).then_some((major, minor))
}

/// An unknown style name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("peer {0:?} is unknown: use qemu-7.2, qemu-10.0 or ramwire")]
pub struct UnknownStyle(String);

impl FromStr for PeerStyle {
    type Err = UnknownStyle;

    /// `qemu-MAJOR.MINOR` from 7.2 on, or `ramwire`.
    fn from_str(name: &str) -> Result<Self, UnknownStyle> {
        let unknown = || UnknownStyle(name.to_owned());
        if name == "ramwire" {
            return Ok(Self::RAMWIRE);
        }
        let version = name.strip_prefix("qemu-").and_then(version_of).ok_or_else(unknown)?;
        if version < (7, 2) {
            return Err(unknown());
        }
        Ok(Self::of_version(version.0, version.1))
    }
}

impl fmt::Display for PeerStyle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let switchover = if self.switchover_start { "" } else { "no " };
        let barrier = match self.barrier {
            BarrierStyle::PerSection => "section",
            BarrierStyle::PerRound => "round",
        };
        let zero_pages = match self.zero_pages {
            ZeroPageStyle::Main => "on the main channel",
            ZeroPageStyle::Multifd => "in multifd packets",
        };
        let preempt = match self.preempt {
            PreemptStyle::Early => "early",
            PreemptStyle::Late => "late",
        };
        write!(
            f,
            "{switchover}SWITCHOVER_START, a barrier per {barrier}, zero pages {zero_pages}, preempt channel {preempt}"
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_style_follows_the_machine_type() {
        use {BarrierStyle as B, PreemptStyle as P, ZeroPageStyle as Z};
        #[rustfmt::skip]
        let cases: &[(&str, bool, BarrierStyle, ZeroPageStyle, PreemptStyle)] = &[
            ("pc-i440fx-2.3",     false, B::PerSection, Z::Main,    P::Early),
            ("pc-i440fx-7.2",     false, B::PerSection, Z::Main,    P::Early),
            ("pc-q35-8.0",        false, B::PerSection, Z::Main,    P::Late),
            ("pc-q35-8.1",        false, B::PerRound,   Z::Main,    P::Late),
            ("virt-8.2",          false, B::PerRound,   Z::Main,    P::Late),
            ("virt-9.0",          false, B::PerRound,   Z::Multifd, P::Late),
            ("pc-q35-9.2",        false, B::PerRound,   Z::Multifd, P::Late),
            ("pc-i440fx-10.0",    true,  B::PerRound,   Z::Multifd, P::Late),
            ("pseries-2.12-sxxm", false, B::PerSection, Z::Main,    P::Early),
            ("pc-i440fx-10.0.1",  true,  B::PerRound,   Z::Multifd, P::Late),
        ];
        for (machine, switchover_start, barrier, zero_pages, preempt) in cases {
            let want = PeerStyle {
                switchover_start: *switchover_start,
                barrier: *barrier,
                zero_pages: *zero_pages,
                preempt: *preempt,
            };
            assert_eq!(PeerStyle::of_machine(machine), Some(want), "{machine}");
        }
        for machine in ["none", "microvm", "", "pc", "x-1", "q-a.b", "m-1.x"] {
            assert_eq!(PeerStyle::of_machine(machine), None, "{machine}");
        }
    }

    #[test]
    fn an_unversioned_machine_shows_its_style_by_what_it_sends() {
        let silent = Seen::default();
        let barrier = Seen { barrier_in_start: Some(true), ..silent };
        let switchover = Seen { switchover_start: true, ..silent };
        assert_eq!(PeerStyle::of_source("microvm", &silent), None);
        assert_eq!(PeerStyle::of_source("microvm", &barrier), Some(PeerStyle::of_version(8, 1)));
        assert_eq!(PeerStyle::of_source("microvm", &switchover), Some(PeerStyle::QEMU_10_0));
        assert_eq!(PeerStyle::of_source("pc-i440fx-7.2", &switchover), Some(PeerStyle::QEMU_7_2));
    }

    #[test]
    fn styles_are_given_by_name() {
        assert_eq!("qemu-7.2".parse(), Ok(PeerStyle::QEMU_7_2));
        assert_eq!("qemu-10.0".parse(), Ok(PeerStyle::QEMU_10_0));
        assert_eq!("ramwire".parse(), Ok(PeerStyle::RAMWIRE));
        for name in ["qemu", "qemu-", "qemu-6.2", "qemu-x", "7.2", ""] {
            assert!(name.parse::<PeerStyle>().is_err(), "{name}");
        }
    }
}
