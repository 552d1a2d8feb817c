//! `ramwire devices`: RDMA devices of this host, and obstacles to a migration by RDMA.

use serde_json::{Value, json};

use super::args::Exit;
use super::common::human_bytes;
use super::output::{result_line, result_text};
use crate::cli::remedies::in_words;

/// Lists the verbs devices of this host with the limits that matter to a migration. A host without a device is no
/// failure.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    ramwire devices
    ramwire devices --json")]
pub(super) struct Args {
    /// Print one JSON object instead of a report
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> Exit {
    let found = find_devices();
    if args.json {
        result_line!("{}", found.json());
    } else {
        result_text!("{}", found.text());
    }
    Exit::Done
}

/// The devices that were found.
struct Found {
    /// The address that a guest can be sent to and from, or why there is none, with the remedy.
    usable: Result<String, String>,
    /// Bytes this process may lock; `None` for no limit.
    memory_lock: Option<u64>,
    devices: Vec<Device>,
}

struct Device {
    name: String,
    firmware: String,
    longest_registration: u64,
    most_registrations: u32,
    most_queue_pairs: u32,
    inline: u32,
    on_demand: bool,
    ports: Vec<Port>,
}

struct Port {
    number: u8,
    state: String,
    link_layer: String,
    mtu: u32,
    /// IP addresses whose connections use it.
    addresses: Vec<String>,
    gids: Vec<String>,
    /// Fit for a migration, or the remedy.
    verdict: Result<(), &'static str>,
}

/// A limit that matters to a migration.
struct Limit {
    name: &'static str,
    value: String,
    verdict: Verdict,
    /// The remedy; empty if none is needed.
    remedy: &'static str,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// It does not matter.
    Good,
    /// A migration works, but at a cost, or not every migration works.
    Limits,
    /// No migration works.
    Blocks,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Limits => "limits",
            Self::Blocks => "blocks",
        }
    }
}

impl Limit {
    fn new(name: &'static str, value: String, verdict: Verdict, remedy: &'static str) -> Self {
        Self { name, value, verdict, remedy }
    }

    fn json(&self) -> Value {
        let remedy = Some(self.remedy).filter(|remedy| !remedy.is_empty());
        json!({ "name": self.name, "value": self.value, "verdict": self.verdict.word(), "remedy": remedy })
    }

    fn text(&self) -> String {
        let remedy = if self.remedy.is_empty() { String::new() } else { format!(": {}", self.remedy) };
        format!("{}: {} ({}){remedy}", self.name, self.value, self.verdict.word())
    }
}

/// Minimum size of a registration: the protocol's chunk.
const CHUNK_BYTES: u64 = 1 << 20;
/// Number of registrations that a large guest with scattered pages needs.
const MANY_REGISTRATIONS: u32 = 1024;
/// Size of a request for one key: the most frequent control message.
const CONTROL_BYTES: u32 = 40;

/// How much this process may lock; registered memory is locked.
fn memory_lock(limit: Option<u64>) -> Limit {
    const NAME: &str = "memory lock";
    match limit {
        None => Limit::new(NAME, "no limit".into(), Verdict::Good, ""),
        Some(limit) => {
            let verdict = if limit < CHUNK_BYTES { Verdict::Blocks } else { Verdict::Limits };
            let remedy = "a guest with more RAM needs a higher limit (ulimit -l, LimitMEMLOCK=), CAP_IPC_LOCK, or \
                          at its source --pin-budget";
            Limit::new(NAME, format!("{} at most", human_bytes(limit)), verdict, remedy)
        }
    }
}

impl Device {
    fn limits(&self) -> [Limit; 5] {
        let pick = |good: bool, less: (Verdict, &'static str)| if good { (Verdict::Good, "") } else { less };
        let of = |name, value, (verdict, remedy)| Limit::new(name, value, verdict, remedy);
        let chunk = "shorter than a chunk of the protocol: take another device, or tcp:";
        let many = "--pin-budget at the source, or --pin-all: one for each RAM block";
        let pairs = "each migration takes two, and one more for each of --queue-pairs";
        let resident = "nothing: memory in use is locked, so the memory lock below counts";
        let inline = "nothing: the device reads control messages from memory";
        [
            of(
                "longest registration",
                human_bytes(self.longest_registration),
                pick(self.longest_registration >= CHUNK_BYTES, (Verdict::Blocks, chunk)),
            ),
            of(
                "registrations",
                format!("{} at most", self.most_registrations),
                pick(self.most_registrations >= MANY_REGISTRATIONS, (Verdict::Limits, many)),
            ),
            of(
                "queue pairs",
                format!("{} at most", self.most_queue_pairs),
                pick(self.most_queue_pairs >= 18, (Verdict::Limits, pairs)),
            ),
            of(
                "on-demand paging",
                if self.on_demand { "yes".into() } else { "no".into() },
                pick(self.on_demand, (Verdict::Limits, resident)),
            ),
            of(
                "inline data",
                format!("{} bytes", self.inline),
                pick(self.inline >= CONTROL_BYTES, (Verdict::Limits, inline)),
            ),
        ]
    }
}

impl Found {
    fn json(&self) -> Value {
        let port = |port: &Port| {
            json!({
                "port": port.number, "state": port.state, "link_layer": port.link_layer, "mtu": port.mtu,
                "addresses": port.addresses, "gids": port.gids, "usable": port.verdict.is_ok(), "remedy": port.verdict.err(),
            })
        };
        let device = |device: &Device| {
            json!({
                "name": device.name,
                "firmware": device.firmware,
                "max_registration_bytes": device.longest_registration,
                "max_registrations": device.most_registrations,
                "max_queue_pairs": device.most_queue_pairs,
                "max_inline_bytes": device.inline,
                "on_demand_paging": device.on_demand,
                "limits": device.limits().iter().map(Limit::json).collect::<Vec<_>>(),
                "ports": device.ports.iter().map(port).collect::<Vec<_>>(),
            })
        };
        json!({
            "usable": self.usable.is_ok(),
            "address": self.usable.as_ref().ok(),
            "why_not": self.usable.as_ref().err(),
            "memory_lock_bytes": self.memory_lock,
            "memory_lock": memory_lock(self.memory_lock).json(),
            "devices": self.devices.iter().map(device).collect::<Vec<_>>(),
        })
    }

    fn text(&self) -> String {
        let mut lines = Vec::new();
        for device in &self.devices {
            let firmware = if device.firmware.is_empty() { "software" } else { &device.firmware };
            lines.push(format!("{} ({firmware})", device.name));
            lines.extend(device.limits().iter().map(|limit| format!("  {}", limit.text())));
            for port in &device.ports {
                let (number, state, layer) = (port.number, &port.state, &port.link_layer);
                lines.push(format!("  port {number}: {state}, {layer}, path MTU up to {}", port.mtu));
                lines.extend(port.addresses.iter().map(|ip| format!("    {ip}")));
                lines.push(match port.verdict {
                    Ok(()) => "    a guest can travel by it".to_owned(),
                    Err(remedy) => format!("    not usable: {remedy}"),
                });
            }
        }
        lines.push(memory_lock(self.memory_lock).text());
        lines.push(match &self.usable {
            Ok(address) => format!("RDMA works here: ramwire receive rdma:{address}:4444 --dir guest"),
            Err(why) => format!("no migration over RDMA from or to this host: {why}"),
        });
        lines.join("\n") + "\n"
    }
}

#[cfg(not(feature = "rdma"))]
fn find_devices() -> Found {
    let usable = match ramwire::transport::rdma_address(0) {
        Ok(address) => Ok(address.to_string()),
        Err(why) => Err(in_words(&why)),
    };
    Found { usable, memory_lock: None, devices: Vec::new() }
}

#[cfg(feature = "rdma")]
fn find_devices() -> Found {
    let lock = rdma_hooks::verbs::memory_lock();
    let memory_lock = lock.limit_bytes.filter(|_| !lock.is_lifted);
    let devices = rdma_hooks::verbs::devices().unwrap_or_default();
    let usable = ramwire::transport::rdma_address(0);
    Found {
        usable: usable.map(|address| address.to_string()).map_err(|why| in_words(&why)),
        memory_lock,
        devices: devices.into_iter().map(Device::from).collect(),
    }
}

#[cfg(feature = "rdma")]
impl From<rdma_hooks::verbs::DeviceInfo> for Device {
    fn from(info: rdma_hooks::verbs::DeviceInfo) -> Self {
        Self {
            name: info.name,
            firmware: info.firmware,
            longest_registration: info.max_registration_bytes,
            most_registrations: info.max_registrations,
            most_queue_pairs: info.max_queue_pairs,
            inline: info.max_inline_bytes,
            on_demand: info.on_demand,
            ports: info.ports.into_iter().map(Port::from).collect(),
        }
    }
}

#[cfg(feature = "rdma")]
impl From<rdma_hooks::verbs::PortInfo> for Port {
    fn from(info: rdma_hooks::verbs::PortInfo) -> Self {
        use rdma_hooks::verbs::{LinkLayer, PortState};
        let is_active = info.state == PortState::Active;
        Self {
            number: info.number,
            verdict: match (is_active, info.addresses.is_empty()) {
                (true, false) => Ok(()),
                (true, true) => Err(
                    "its interface has no IP address here; give it one: ip addr add ADDRESS dev INTERFACE",
                ),
                (false, _) => {
                    Err("bring its interface up (ip link set INTERFACE up) and see to cable and switch")
                }
            },
            state: match info.state {
                PortState::Active => "active".into(),
                PortState::Inactive(1) => "down".into(),
                PortState::Inactive(number) => format!("inactive (state {number})"),
            },
            link_layer: match info.link_layer {
                LinkLayer::InfiniBand => "InfiniBand".into(),
                LinkLayer::Ethernet => "Ethernet".into(),
                LinkLayer::Other(number) => format!("link layer {number}"),
            },
            mtu: info.mtu_bytes,
            addresses: info.addresses.iter().map(ToString::to_string).collect(),
            gids: info.gids.iter().map(|gid| std::net::Ipv6Addr::from(*gid).to_string()).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(verdict: Result<(), &'static str>) -> Port {
        let (state, link_layer) = ("active".into(), "Ethernet".into());
        let (addresses, gids) = (vec!["10.9.0.1".into()], vec!["fe80::2".into()]);
        Port { number: 1, state, link_layer, mtu: 4096, addresses, gids, verdict }
    }

    #[test]
    fn each_port_has_a_verdict_and_the_host_has_one() {
        let device = Device {
            name: "rxe0".into(),
            firmware: String::new(),
            longest_registration: 1 << 30,
            most_registrations: 100,
            most_queue_pairs: 10,
            inline: 0,
            on_demand: false,
            ports: vec![port(Ok(())), port(Err("bring it up"))],
        };
        let found = Found { usable: Ok("10.9.0.1".into()), memory_lock: Some(65536), devices: vec![device] };
        let text = found.text();
        for part in [
            "rxe0 (software)",
            "    10.9.0.1\n    a guest can travel",
            "not usable: bring it up",
            "memory lock: 64.00 KiB at most (blocks): a guest",
            "longest registration: 1.00 GiB (good)",
            "registrations: 100 at most (limits): --pin-budget",
            "inline data: 0 bytes (limits)",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let json = found.json();
        let verdicts = json["devices"][0]["limits"].as_array().unwrap_or(&Vec::new()).len();
        assert_eq!((verdicts, &json["memory_lock"]["verdict"]), (5, &json!("blocks")));
        assert_eq!(
            (&json["usable"], &json["devices"][0]["ports"][1]["usable"]),
            (&json!(true), &json!(false))
        );
    }

    #[test]
    fn a_host_without_devices_says_what_to_do() {
        let found = Found { usable: Err("install rdma-core".into()), memory_lock: None, devices: Vec::new() };
        assert!(found.text().contains("install rdma-core") && found.text().contains("no limit"));
        assert_eq!(found.json()["why_not"], "install rdma-core");
    }
}
