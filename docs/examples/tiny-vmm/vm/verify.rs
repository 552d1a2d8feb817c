//! The look from outside: what every page of the VM must hold, by the registers of its vCPUs.

use ramwire::guest::{GuestMemory, MappedGuest};
use ramwire::ram::PageRun;

use super::code::{Duty, Plan, Words, all_pages};

/// Wrong pages that are told in words.
const MAX_FAULTS: usize = 8;

/// What a look at all pages found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Pages looked at.
    pub pages: u64,
    /// Pages that do not hold what they must, and vCPUs that had to stop.
    pub wrong: u64,
    /// The first of them in words.
    pub faults: Vec<String>,
}

impl Found {
    pub(super) fn add(&mut self, fault: String) {
        self.wrong += 1;
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(fault);
        }
    }
}

/// `sequences`: the write each vCPU is at.
pub(super) fn check_pages(memory: &MappedGuest, plan: &Plan, sequences: &[u32], found: &mut Found) {
    let mut bytes = [0; 4096];
    for run in all_pages(memory) {
        found.pages += 1;
        let table = memory.table();
        let read = table.admit_run(run).ok().and_then(|landing| memory.span(landing).ok());
        let full = read.is_some_and(|span| span.copy_to(&mut bytes) == bytes.len());
        if !full || !is_right(plan, sequences, run, &bytes) {
            let name = table.get(run.block).map_or_else(String::new, |block| block.name.to_string());
            let words = words(&bytes);
            found.add(format!(
                "RAM block {name} page {:#x} holds {:#x?} and so on",
                run.first.0,
                words.get(..3).unwrap_or_default()
            ));
        }
    }
}

fn is_right(plan: &Plan, sequences: &[u32], run: PageRun, bytes: &[u8; 4096]) -> bool {
    let Duty::Written { vcpu, index } = plan.duty(run) else {
        return *bytes == to_bytes(&plan.fill(run));
    };
    let (Some(n), Some(lane)) = (sequences.get(vcpu), plan.lanes.get(vcpu)) else { return false };
    let at = n % lane.pages;
    // In this lap the pages before the one it is at were written.
    let lap = n - at;
    let before = |index: u32| lap + index - lane.pages;
    if index != at {
        let last = if index < at { lap + index } else { before(index) };
        return *bytes == to_bytes(&plan.after(run, last));
    }
    // The page it is at may be half written: each word is the new one or the old one.
    let (old, new) = (plan.after(run, before(index)), plan.after(run, *n));
    let each = words(bytes).into_iter().zip(old.into_iter().zip(new));
    each.fold(true, |right, (word, (old, new))| right && (word == old || word == new))
}

fn words(bytes: &[u8; 4096]) -> Vec<u32> {
    bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect()
}

pub(super) fn to_bytes(words: &Words) -> [u8; 4096] {
    let mut bytes = [0; 4096];
    for (place, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
        *place = word.to_le_bytes();
    }
    bytes
}
