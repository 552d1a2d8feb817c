//! The contestants of `ramwire-bench migrate`: their names, and the programs.

use std::fmt;
use std::str::FromStr;

use ramwire::sys::CancelToken;
use ramwire::transport::PageSending;

use super::bed::Bed;
use super::floors::{self, Floor, Pattern};
use super::own::{self, Way};
use super::{MigrateArgs, Run, iperf, openssl};
use crate::BenchError;
use crate::qemu::{self, Qemu};

/// A contestant's name as given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Against {
    /// This program.
    Ramwire(Way),
    /// A QEMU with this many multifd channels.
    Qemu {
        /// `7.2` or `10.0`.
        version: &'static str,
        /// 0: the plain stream.
        channels: u8,
    },
    /// A bare loop.
    Floor(Pattern),
    /// One process reads.
    Sweep,
    /// One process copies.
    Memcpy,
    /// One buffer over TCP.
    Iperf3,
    /// Encryption and decryption by OpenSSL, and a bare loop.
    Openssl,
    /// Bare RDMA WRITEs.
    IbWriteBw,
}

impl FromStr for Against {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = "write ramwire (with :CHANNELS, +unix, +whole, +fast, +splice or +zerocopy perhaps), qemu72, qemu10 (with :CHANNELS \
                     perhaps), floor, floor-packet, floor-direct, openssl, sweep, memcpy, iperf3 or ib_write_bw";
        let mut options = text.split('+');
        let text = options.next().unwrap_or_default();
        let (name, channels) = match text.split_once(':') {
            Some((name, channels)) => (name, channels.parse().ok().filter(|channels| *channels > 0)),
            None => (text, Some(0)),
        };
        let channels = channels.ok_or("write 1 to 255 channels")?;
        let mut way = Way { channels, ..Way::default() };
        for option in options {
            match (name, option) {
                ("ramwire", "unix") => way.unix = true,
                ("ramwire", "whole") => way.whole = true,
                ("ramwire", "fast") => way.fast = true,
                ("ramwire", sending) if channels > 0 => {
                    way.sending = sending.parse().map_err(|_| known)?;
                }
                _ => return Err(known.into()),
            }
        }
        match (name, channels) {
            ("ramwire", _) => Ok(Self::Ramwire(way)),
            ("qemu72", _) => Ok(Self::Qemu { version: "7.2", channels }),
            ("qemu10", _) => Ok(Self::Qemu { version: "10.0", channels }),
            ("floor", 0) => Ok(Self::Floor(Pattern::Stream)),
            ("floor-packet", 0) => Ok(Self::Floor(Pattern::Packet)),
            ("floor-direct", 0) => Ok(Self::Floor(Pattern::Direct)),
            ("sweep", 0) => Ok(Self::Sweep),
            ("memcpy", 0) => Ok(Self::Memcpy),
            ("iperf3", 0) => Ok(Self::Iperf3),
            ("openssl", 0) => Ok(Self::Openssl),
            ("ib_write_bw", 0) => Ok(Self::IbWriteBw),
            _ => Err(known.into()),
        }
    }
}

impl fmt::Display for Against {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, channels) = match self {
            Self::Ramwire(way) => ("ramwire", way.channels),
            Self::Qemu { version: "7.2", channels } => ("qemu72", *channels),
            Self::Qemu { channels, .. } => ("qemu10", *channels),
            Self::Floor(Pattern::Stream) => ("floor", 0),
            Self::Floor(Pattern::Packet) => ("floor-packet", 0),
            Self::Floor(Pattern::Direct) => ("floor-direct", 0),
            Self::Sweep => ("sweep", 0),
            Self::Memcpy => ("memcpy", 0),
            Self::Iperf3 => ("iperf3", 0),
            Self::Openssl => ("openssl", 0),
            Self::IbWriteBw => ("ib_write_bw", 0),
        };
        f.write_str(name)?;
        if channels > 0 {
            write!(f, ":{channels}")?;
        }
        match self {
            Self::Ramwire(way) => {
                let unix = if way.unix { "+unix" } else { "" };
                write!(f, "{unix}{}", if way.whole { "+whole" } else { "" })?;
                f.write_str(if way.fast { "+fast" } else { "" })?;
                match way.sending {
                    PageSending::Copy => Ok(()),
                    sending => write!(f, "+{sending}"),
                }
            }
            _ => Ok(()),
        }
    }
}

/// A program that migrates the memory.
pub enum Mover {
    /// This program.
    Ramwire(Way),
    /// A QEMU.
    Qemu(Qemu),
    /// A bare loop.
    Floor(Floor),
    /// One process reads.
    Sweep,
    /// One process copies.
    Memcpy,
    /// One buffer over TCP.
    Iperf3,
    /// Encryption and decryption by OpenSSL, and this bare loop.
    Openssl(Floor),
}

impl Mover {
    /// The program of that name.
    ///
    /// # Errors
    /// [`BenchError::Missing`] for a program that is not here.
    pub fn of(against: Against, args: &MigrateArgs) -> Result<Self, BenchError> {
        Ok(match against {
            Against::Ramwire(way) => Self::Ramwire(way),
            Against::Qemu { version, channels } => {
                let given = if version == "7.2" { &args.qemu72 } else { &args.qemu100 };
                Self::Qemu(Qemu::find(
                    &against.to_string(),
                    version,
                    given.as_deref(),
                    qemu::Way::Stream { channels },
                )?)
            }
            Against::Floor(pattern) => Self::Floor(Floor::new(pattern)),
            Against::Sweep => Self::Sweep,
            Against::Memcpy => Self::Memcpy,
            Against::Iperf3 => Self::Iperf3,
            Against::Openssl => Self::Openssl(Floor::new(Pattern::Packet)),
            Against::IbWriteBw => {
                let known = "ramwire, qemu72, qemu10, floor, floor-packet, floor-direct, openssl, sweep, memcpy and iperf3";
                return Err(BenchError::NotThisWay { who: against.to_string(), known });
            }
        })
    }

    /// Prepares for the rounds: a bare loop finds its best buffer.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn settled(self, bed: &Bed, cancel: &CancelToken) -> Result<Self, BenchError> {
        match self {
            Self::Floor(floor) => floors::best(floor.pattern, bed, cancel).map(Self::Floor),
            Self::Openssl(floor) => floors::best(floor.pattern, bed, cancel).map(Self::Openssl),
            other => Ok(other),
        }
    }

    /// Its name in the report.
    pub fn name(&self, against: Against) -> String {
        match self {
            Self::Floor(floor) => format!("{against} {}", floor.buffer_name()),
            _ => against.to_string(),
        }
    }

    /// True if the memory arrives in the bed's other file.
    pub fn fills_destination(&self) -> bool {
        !matches!(self, Self::Sweep | Self::Memcpy | Self::Iperf3)
    }

    /// One run, from memory in the state of `--populated`.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn run(&self, bed: &Bed) -> Result<Run, BenchError> {
        let populate_seconds = if self.fills_destination() { bed.renew()? } else { None };
        let run = match self {
            Self::Ramwire(way) => own::run(bed, *way),
            Self::Qemu(qemu) => qemu.run(bed),
            Self::Floor(floor) => floors::run(*floor, bed),
            Self::Sweep => floors::sweep(bed),
            Self::Memcpy => floors::copy(bed),
            Self::Iperf3 => iperf::run(bed),
            Self::Openssl(floor) => openssl::run(*floor, bed),
        }?;
        Ok(Run { populate_seconds, ..run })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;

    #[test]
    fn names_are_read_as_written() {
        for name in [
            "ramwire",
            "ramwire:8",
            "ramwire+unix",
            "ramwire:2+unix+whole",
            "ramwire:2+whole+fast",
            "ramwire:2+zerocopy",
            "ramwire:4+whole+splice",
            "qemu72",
            "qemu10",
            "qemu10:4",
            "floor",
            "floor-packet",
            "floor-direct",
            "sweep",
            "memcpy",
            "iperf3",
            "openssl",
            "ib_write_bw",
        ] {
            assert_eq!(name.parse::<Against>().unwrap().to_string(), name);
        }
        for wrong in [
            "qemu11",
            "floor:2",
            "qemu10:0",
            "qemu10:256",
            "qemu10:",
            "qemu10+unix",
            "ramwire+",
            "ramwire+copy",
            "",
        ] {
            assert!(wrong.parse::<Against>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_missing_program_is_named_with_what_would_help() {
        let error = Qemu::find("qemu10", "10.0", Some(Path::new("/none")), qemu::Way::Stream { channels: 0 })
            .unwrap_err();
        assert!(error.to_string().contains("ci/setup") && error.to_string().contains("--qemu100"), "{error}");
    }
}
