//! On which NUMA node the thread of each page channel works.
//!
//! A thread's first touch allocates memory on its own node, and reading memory or a network device of another node is
//! slower. So threads of page channels are spread over the nodes, each pinned to the processors of one. With only one
//! node, nothing is queried and nothing is set.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use crate::guest::GuestMemory;
use crate::sys::{
    Job, NumaNode, cpu_list, node_of_address, nodes_of_pages, numa_nodes, own_cpus, set_cpu_affinity,
};
use crate::transport::StreamChannel;
use crate::units::BlockIndex;

/// Pages of a block whose node is queried.
const SAMPLES: u64 = 64;

/// A node counts as holding the guest's memory if it has at least one in this many pages.
const SHARE: usize = 8;

/// Where the threads of page channels run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Numa {
    /// Spread over the nodes that this process may use; at a source only over those that hold the guest's memory, if
    /// they have a processor for each channel. The node of the network device comes first.
    Auto,
    /// Where the embedder starts them.
    #[default]
    Off,
    /// Spread over these nodes, in this order.
    Nodes(Vec<u32>),
}

impl Numa {
    /// A node of the list that this machine does not have, and the nodes that it has.
    pub fn missing(&self) -> Option<(u32, Vec<u32>)> {
        let Self::Nodes(list) = self else { return None };
        let here: Vec<u32> = numa_nodes().iter().map(|node| node.number).collect();
        // A kernel that reports no nodes has one, so there is no choice.
        list.iter().find(|node| !here.is_empty() && !here.contains(node)).map(|node| (*node, here.clone()))
    }
}

impl FromStr for Numa {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => match cpu_list(text) {
                Some(list) if !list.is_empty() => Ok(Self::Nodes(list)),
                _ => Err("write auto, off, or nodes like 0,2-3".into()),
            },
        }
    }
}

impl fmt::Display for Numa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::Nodes(list) => {
                let list: Vec<_> = list.iter().map(u32::to_string).collect();
                f.write_str(&list.join(","))
            }
        }
    }
}

/// The chosen nodes: channels take them in turn. Empty: threads stay where they are started.
#[derive(Clone, Debug, Default)]
pub(super) struct Placement(Arc<[NumaNode]>);

impl Placement {
    /// For `channels` that send pages of `memory`.
    pub(super) fn of_source(choice: &Numa, channels: &[StreamChannel], memory: &dyn GuestMemory) -> Self {
        Self::choose(choice, channels, || nodes_of(memory))
    }

    /// For `channels` that receive pages into memory that is not populated yet.
    pub(super) fn of_destination(choice: &Numa, channels: &[StreamChannel]) -> Self {
        Self::choose(choice, channels, Vec::new)
    }

    fn choose(choice: &Numa, channels: &[StreamChannel], held: impl FnOnce() -> Vec<u32>) -> Self {
        let nodes = if *choice == Numa::Off { Vec::new() } else { numa_nodes() };
        if nodes.len() < 2 || channels.is_empty() {
            return Self::default();
        }
        let own = own_cpus().unwrap_or_else(|error| {
            tracing::warn!(%error, "threads of page channels are bound to no NUMA node");
            Vec::new()
        });
        let nic = channels.first().and_then(local_address).and_then(node_of_address);
        let machine = Machine { nodes, own, held: held(), nic };
        let chosen = machine.chosen(choice, channels.len());
        let numbers: Vec<u32> = chosen.iter().map(|node| node.number).collect();
        tracing::info!(%choice, nodes = ?numbers, held = ?machine.held, nic, "NUMA nodes of page channels");
        Self(chosen.into())
    }

    /// Wraps the job of this channel's thread: the thread first sets its affinity.
    pub(super) fn keep(&self, channel: usize, job: Job) -> Job {
        let Some(at) = channel.checked_rem(self.0.len()) else { return job };
        let nodes = Arc::clone(&self.0);
        Box::new(move || {
            let node = &nodes[at];
            match set_cpu_affinity(&node.cpus) {
                Ok(true) => {}
                Ok(false) => tracing::debug!(node.number, "a page channel's thread was started elsewhere"),
                Err(error) => tracing::warn!(%error, node.number, "a page channel's thread runs anywhere"),
            }
            job();
        })
    }
}

/// The inputs of a choice.
struct Machine {
    nodes: Vec<NumaNode>,
    /// Processors that this process may use.
    own: Vec<u32>,
    /// Nodes that hold the guest's memory.
    held: Vec<u32>,
    /// The network device's node.
    nic: Option<u32>,
}

impl Machine {
    fn chosen(&self, choice: &Numa, channels: usize) -> Vec<NumaNode> {
        let usable = |node: &NumaNode| {
            let cpus: Vec<u32> = node.cpus.iter().copied().filter(|cpu| self.own.contains(cpu)).collect();
            (!cpus.is_empty()).then_some(NumaNode { number: node.number, cpus })
        };
        let usable: Vec<NumaNode> = self.nodes.iter().filter_map(usable).collect();
        let named = |number: &u32| usable.iter().find(|node| node.number == *number).cloned();
        match choice {
            Numa::Off => Vec::new(),
            Numa::Nodes(list) => list.iter().filter_map(named).collect(),
            // Nothing to choose.
            Numa::Auto if usable.len() < 2 => Vec::new(),
            Numa::Auto => {
                let near: Vec<NumaNode> = self.held.iter().filter_map(named).collect();
                let room: usize = near.iter().map(|node| node.cpus.len()).sum();
                let mut chosen = if room >= channels.max(1) { near } else { usable.clone() };
                // A stable sort: the other nodes keep their order.
                chosen.sort_by_key(|node| Some(node.number) != self.nic);
                chosen
            }
        }
    }
}

/// The nodes that hold the guest's memory, found by a sample of pages of each block.
fn nodes_of(memory: &dyn GuestMemory) -> Vec<u32> {
    let table = memory.table();
    let mut addresses = Vec::new();
    for index in 0..table.blocks().len() as u32 {
        let landing = table.whole(BlockIndex(index)).and_then(|run| table.admit_run(run).ok());
        let Some(span) = landing.and_then(|landing| memory.span(landing).ok()) else { continue };
        let pages = span.len() as u64 / table.page().bytes();
        let step = pages.div_ceil(SAMPLES).max(1);
        let offsets = (0..pages).step_by(step as usize).map(|page| (page * table.page().bytes()) as usize);
        addresses.extend(offsets.map(|offset| span.address() + offset));
    }
    let found = nodes_of_pages(&addresses).unwrap_or_else(|error| {
        tracing::info!(%error, "the NUMA nodes of the guest's memory are not known");
        Vec::new()
    });
    let mut found: Vec<u32> = found.into_iter().flatten().collect();
    found.sort_unstable();
    let of_one: Vec<&[u32]> = found.chunk_by(|one, other| one == other).collect();
    of_one.iter().filter(|pages| pages.len() * SHARE >= found.len()).map(|pages| pages[0]).collect()
}

fn local_address(channel: &StreamChannel) -> Option<IpAddr> {
    let (end, _) = channel.end();
    Some(socket2::SockRef::from(&end.fd).local_addr().ok()?.as_socket()?.ip())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn node(number: u32, cpus: std::ops::Range<u32>) -> NumaNode {
        NumaNode { number, cpus: cpus.collect() }
    }

    /// Three nodes with four processors each, all of which may be used.
    fn machine() -> Machine {
        let nodes = vec![node(0, 0..4), node(1, 4..8), node(4, 8..12)];
        Machine { nodes, own: (0..12).collect(), held: Vec::new(), nic: None }
    }

    fn numbers(machine: &Machine, choice: &str, channels: usize) -> Vec<u32> {
        let chosen = machine.chosen(&choice.parse().unwrap(), channels);
        chosen.iter().map(|node| node.number).collect()
    }

    #[test]
    fn all_nodes_are_taken_the_network_devices_first() {
        let mut machine = machine();
        assert_eq!(numbers(&machine, "auto", 8), [0, 1, 4]);
        machine.nic = Some(1);
        assert_eq!(numbers(&machine, "auto", 8), [1, 0, 4]);
        machine.nic = Some(7);
        assert_eq!(numbers(&machine, "auto", 8), [0, 1, 4]);
        assert!(numbers(&machine, "off", 8).is_empty());
    }

    #[test]
    fn nodes_that_hold_the_memory_are_enough_if_they_have_the_processors() {
        let mut machine = machine();
        (machine.held, machine.nic) = (vec![1, 4], Some(4));
        assert_eq!(numbers(&machine, "auto", 8), [4, 1]);
        assert_eq!(numbers(&machine, "auto", 9), [4, 0, 1]);
        machine.held = vec![1];
        assert_eq!(numbers(&machine, "auto", 4), [1]);
        // Memory without processors near it.
        machine.held = vec![9];
        assert_eq!(numbers(&machine, "auto", 1), [4, 0, 1]);
    }

    #[test]
    fn only_processors_that_may_be_used_count() {
        let mut machine = machine();
        machine.own = vec![1, 2, 9];
        let chosen = machine.chosen(&Numa::Auto, 2);
        assert_eq!(chosen, [node(0, 1..3), node(4, 9..10)]);
        machine.own = vec![5, 6];
        assert!(numbers(&machine, "auto", 2).is_empty(), "one node is no choice");
        assert_eq!(numbers(&machine, "1", 2), [1]);
        assert!(numbers(&machine, "0,4", 2).is_empty());
    }

    #[test]
    fn a_list_is_taken_as_it_is_and_channels_take_nodes_in_turn() {
        let machine = machine();
        assert_eq!(numbers(&machine, "4,0", 2), [4, 0]);
        assert_eq!(numbers(&machine, "0-1,7", 2), [0, 1]);
        for text in ["auto", "off", "4,0"] {
            assert_eq!(text.parse::<Numa>().unwrap().to_string(), text);
        }
        for wrong in ["", "on", "1-0", "-1", "0,x"] {
            assert!(wrong.parse::<Numa>().is_err(), "{wrong:?}");
        }
    }

    /// On this machine's own first node.
    #[test]
    fn a_job_runs_on_its_node_and_without_one_where_it_is_started() {
        let before = own_cpus().unwrap();
        let ran_on = |placement: &Placement, channel| {
            let (give, take) = std::sync::mpsc::channel();
            let job = placement.keep(channel, Box::new(move || give.send(own_cpus().unwrap()).unwrap()));
            std::thread::spawn(job).join().unwrap();
            take.recv().unwrap()
        };
        let nodes = before.iter().map(|cpu| node(0, *cpu..cpu + 1)).collect::<Vec<_>>();
        let placement = Placement(nodes.into());
        for channel in 0..2 * before.len() {
            assert_eq!(ran_on(&placement, channel), [before[channel % before.len()]]);
        }
        assert_eq!(ran_on(&Placement::default(), 0), before);
    }
}
