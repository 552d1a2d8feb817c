//! The device state: what the machine is, over which blocks, and each vCPU's registers; four bytes of length, then JSON.

use std::io::{self, Read};

use ramwire::guest::{GuestMemory, MappedGuest};
use serde::{Deserialize, Serialize};

use super::Shape;
use super::code::invalid;
use super::vcpu::Registers;

/// Registers of a vCPU take about 2 KiB; more than this is no state of ours.
const MAX_BYTES: u32 = 1 << 20;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedState {
    pub(super) shape: Shape,
    /// Guest address and length of each block: another machine's memory is refused.
    blocks: Vec<(u32, u64)>,
    pub(super) vcpus: Vec<Registers>,
}

fn blocks(memory: &MappedGuest, addresses: &[u32]) -> Vec<(u32, u64)> {
    let lengths = memory.table().blocks().iter().map(|block| block.used_length);
    addresses.iter().copied().zip(lengths).collect()
}

impl SavedState {
    pub(super) fn new(shape: Shape, memory: &MappedGuest, addresses: &[u32], vcpus: Vec<Registers>) -> Self {
        Self { shape, blocks: blocks(memory, addresses), vcpus }
    }

    pub(super) fn encode(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_vec(self)?;
        let mut out = (json.len() as u32).to_le_bytes().to_vec();
        out.extend(json);
        Ok(out)
    }

    /// Reads what another process said; it is checked against the memory that is here.
    pub(super) fn decode(from: &mut dyn Read, memory: &MappedGuest, addresses: &[u32]) -> io::Result<Self> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > MAX_BYTES {
            return Err(invalid(format!("a device state of {length} bytes is no tiny VM's")));
        }
        let mut json = vec![0; length as usize];
        from.read_exact(&mut json)?;
        let state: Self = serde_json::from_slice(&json)?;
        if state.blocks != blocks(memory, addresses) {
            return Err(invalid("the device state is of a machine with other RAM".into()));
        }
        state.shape.check()?;
        if state.vcpus.len() != state.shape.vcpus as usize {
            return Err(invalid("the device state has another number of vCPUs than it says".into()));
        }
        Ok(state)
    }
}
