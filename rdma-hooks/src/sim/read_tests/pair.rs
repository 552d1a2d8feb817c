//! Two simulated hosts, one of which reads the other's memory.

use std::sync::Arc;
use std::time::Duration;

use super::super::world::{Breakage, next_random};
use super::super::*;
use super::{BYTES, LONG, PAGE};
use crate::fabric::{CompletionStatus, Operation, ReadPiece};
use crate::region::RegionMemory;
use crate::stop::Cancel;

pub(super) struct Random(u64);

impl Random {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        next_random(&mut self.0) % bound
    }
}

pub(super) fn bytes_of(memory: &SparseMemory, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    memory.read(offset, &mut bytes);
    bytes
}

/// A READ of the test: where its bytes are, and where they go.
#[derive(Clone, Debug)]
pub(super) struct Pull {
    pub(super) id: u64,
    pub(super) offset: u64,
    pub(super) pieces: Vec<ReadPiece>,
}

impl Pull {
    pub(super) fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| u64::from(piece.len)).sum()
    }
}

/// Host A's memory is read by host B, over one or more queue pairs to the same peer.
pub(super) struct Pair {
    sim: Sim,
    pub(super) random: Random,
    pub(super) ram: Arc<SparseMemory>,
    pub(super) copy: Arc<SparseMemory>,
    pub(super) served: Option<Registration>,
    pub(super) target: Registration,
    pub(super) servers: Vec<Box<dyn Endpoint>>,
    pub(super) pullers: Vec<Box<dyn Endpoint>>,
    next_id: u64,
    _part: Part,
}

impl Pair {
    pub(super) fn new(
        seed: u64,
        breakage: Breakage,
        lanes: usize,
        rights: [&[Access]; 2],
        faults: &[(Host, Fault)],
    ) -> Self {
        let mut random = Random(seed);
        let config = SimConfig {
            seed,
            loss_per_mille: if random.below(3) == 0 { 40 } else { 0 },
            faults: faults.to_vec(),
            reads: [16, 1 + random.below(8) as u8].map(|most| ReadDepth { own: most, served: most }),
            ..SimConfig::default()
        };
        let sim = Sim::new(config);
        sim.0.lock().breakage = breakage;
        let (a, b) = (sim.fabric(Host::A), sim.fabric(Host::B));
        let params = |own, served| ConnectParams {
            private_data: vec![],
            receives: 2,
            receive_bytes: 64,
            send_depth: 64,
            reads: ReadDepth { own, served },
            read_pieces: 3,
        };
        let (asks, allows) = (1 + random.below(10) as u8, 1 + random.below(10) as u8);
        let mut listener = b.listen("sim", 1).unwrap();
        let stop = Stop::new(Some(a.now() + LONG), Cancel::default());
        // Each thread leaves when it has its ends: then time does not wait for it.
        let (parts, stop) = ([a.enter(), b.enter()], &stop);
        let (servers, pullers): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
            let [connects, accepts] = parts;
            let servers = scope.spawn(move || {
                let _part = connects;
                let connect = |_| a.connect("sim", 1, &params(0, allows), stop).unwrap();
                (0..lanes).map(connect).collect()
            });
            let pullers = scope.spawn(move || {
                let _part = accepts;
                let accept = |_| listener.next_request(stop).unwrap().accept(&params(asks, 0), stop).unwrap();
                (0..lanes).map(accept).collect()
            });
            (servers.join().unwrap(), pullers.join().unwrap())
        });
        let part = sim.fabric(Host::B).enter();
        let [ram, copy] = [(); 2].map(|()| Arc::new(SparseMemory::new(BYTES)));
        for at in (0..BYTES).step_by(PAGE as usize) {
            // No byte is zero, nor one that tests write later.
            let words = (0..PAGE / 8).flat_map(|_| random.below(u64::MAX).to_le_bytes());
            let page: Vec<u8> = words.map(|byte| 1 + byte % 200).collect();
            ram.write(at, &page);
        }
        let register = |endpoint: &dyn Endpoint, memory: &Arc<SparseMemory>, rights| {
            endpoint.register(&HostRegion::new(memory.clone()), rights, AddressBase::Host).unwrap()
        };
        let served = Some(register(&*servers[0], &ram, rights[0]));
        let target = register(&*pullers[0], &copy, rights[1]);
        Self { sim, random, ram, copy, served, target, servers, pullers, next_id: 0, _part: part }
    }

    pub(super) fn pull(&mut self, offset: u64, bytes: u64) -> Pull {
        self.next_id += 1;
        let mut pieces = Vec::new();
        let (mut at, end) = (offset, offset + bytes);
        while at < end {
            let left = end - at;
            let len = if pieces.len() == 2 { left } else { 1 + self.random.below(left) };
            pieces.push(ReadPiece { lkey: self.target.lkey, to: self.target.address + at, len: len as u32 });
            at += len;
        }
        Pull { id: self.next_id, offset, pieces }
    }

    pub(super) fn post(&mut self, lane: usize, key: (u32, u64), pulls: &[Pull]) -> Result<(), FabricError> {
        let request = |pull: &Pull| ReadRequest {
            id: pull.id,
            rkey: key.0,
            from: key.1.wrapping_add(pull.offset),
            into: &[],
        };
        let mut chain: Vec<ReadRequest<'_>> = pulls.iter().map(request).collect();
        for (read, pull) in chain.iter_mut().zip(pulls) {
            read.into = &pull.pieces;
        }
        self.pullers[lane].post_reads(&chain)
    }

    pub(super) fn key(&self) -> (u32, u64) {
        self.served.as_ref().map(|served| (served.rkey, served.address)).unwrap()
    }

    /// Waits for completions, or for the time to be over.
    pub(super) fn completions(&mut self, lane: usize) -> Vec<Completion> {
        let (mut found, until) = (Vec::new(), self.sim.elapsed() + LONG);
        while found.is_empty() && self.sim.elapsed() < until {
            self.pullers[lane].wait(Duration::from_millis(500)).unwrap();
            self.pullers[lane].poll(&mut found).unwrap();
        }
        found.retain(|found| !matches!(found, Completion::Failed { operation: Operation::Receive, .. }));
        found
    }

    pub(super) fn is_in_place(&self, pull: &Pull) -> Result<(), String> {
        let [wanted, got] = [&self.ram, &self.copy].map(|memory| bytes_of(memory, pull.offset, pull.bytes()));
        if wanted == got { Ok(()) } else { Err(format!("{pull:?} completed before its bytes were there")) }
    }

    /// Waits until all of `pulls` have ended: first those that are done, then one failure, then what it flushed.
    pub(super) fn settle(
        &mut self,
        lane: usize,
        pulls: &[Pull],
    ) -> Result<(usize, Option<CompletionStatus>), String> {
        let (mut done, mut failed, mut ended) = (0, None, 0);
        while ended < pulls.len() {
            let found = self.completions(lane);
            if found.is_empty() {
                return Err(format!("only {ended} of {} READs have ended", pulls.len()));
            }
            for completion in found {
                ended += 1;
                match completion {
                    Completion::Done { id }
                        if failed.is_none() && pulls.get(done).map(|pull| pull.id) == Some(id) =>
                    {
                        self.is_in_place(&pulls[done])?;
                        done += 1;
                    }
                    Completion::Failed { operation: Operation::Read, status, .. } if failed.is_none() => {
                        failed = Some(status);
                    }
                    Completion::Failed { status: CompletionStatus::Flushed, .. } => {}
                    other => return Err(format!("{other:?} after {done} READs, failure {failed:?}")),
                }
            }
        }
        Ok((done, failed))
    }

    pub(super) fn check(is_right: bool, what: impl FnOnce() -> String) -> Result<(), String> {
        if is_right { Ok(()) } else { Err(what()) }
    }
}
