//! Two ends on one simulated network, each a closure that calls its hooks as it likes.

use std::sync::Arc;
use std::time::Duration;

use rdma_hooks::sim::{Host, Sim, SimConfig, SimFabric, SparseMemory};
use rdma_hooks::{
    BlockSpan, Cancel, DestinationHooks, Fabric, HooksError, HostRegion, PageContent, RamBlock, RamControl,
    SourceHooks, Stop,
};

use super::PORT;

pub fn seconds(fabric: &SimFabric, seconds: u64) -> Stop {
    Stop::new(Some(fabric.now() + Duration::from_secs(seconds)), Cancel::default())
}

/// Runs both ends, each in a thread, on a fresh network.
pub fn both<S: Send, D: Send>(
    config: SimConfig,
    source: impl FnOnce(SimFabric) -> S + Send,
    destination: impl FnOnce(SimFabric, Box<dyn rdma_hooks::fabric::Listener>) -> D + Send,
) -> (S, D, Sim) {
    let sim = Sim::new(config);
    let (from, to) = (sim.fabric(Host::A), sim.fabric(Host::B));
    let listener = to.listen("sim", PORT).unwrap();
    std::thread::scope(|scope| {
        let part = to.enter();
        let there = scope.spawn(move || {
            let _part = part;
            destination(to, listener)
        });
        let part = from.enter();
        let here = scope.spawn(move || {
            let _part = part;
            source(from)
        });
        (here.join().expect("source"), there.join().expect("destination"), sim.clone())
    })
}

pub fn ram(len: u64) -> (Arc<SparseMemory>, RamBlock) {
    let memory = Arc::new(SparseMemory::new(len));
    (memory.clone(), RamBlock::new("ram", HostRegion::new(memory)))
}

pub fn open(hooks: &mut SourceHooks, kind: RamControl, stop: &Stop) {
    let mark = hooks.registration_start(kind).unwrap().unwrap();
    hooks.write_stream(&mark.to_bytes(), stop).unwrap();
}

pub fn span(offset: u64, len: u64, content: PageContent) -> BlockSpan {
    BlockSpan { block: 0, offset, len, content }
}

/// Serves rounds of a source that sends nothing but marks; `rounds` with the setup.
pub fn serve(
    hooks: &mut DestinationHooks,
    block: RamBlock,
    rounds: usize,
    stop: &Stop,
) -> Result<(), HooksError> {
    let length = block.region.len();
    hooks.add_block(block)?;
    hooks.block_notification("ram", length)?;
    for _ in 0..rounds {
        let mut mark = [0; 8];
        let mut done = 0;
        while done < 8 {
            done += hooks.read_stream(&mut mark[done..], stop)?;
        }
        hooks.registration_handle(stop)?;
    }
    Ok(())
}
