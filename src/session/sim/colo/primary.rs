//! A QEMU as the primary: its guest writes, and every so often it sends a checkpoint.

use std::collections::{BTreeMap, BTreeSet};

use super::world::{Page, World};
use crate::ram::BlockName;
use crate::stream::qemu::blocks::{BlockAnnouncement, encode_block_list};
use crate::stream::qemu::colo::{ColoMessage, MESSAGE_LEN, encode_size};
use crate::stream::qemu::command::Command;
use crate::stream::qemu::file::{Configuration, encode_configuration, encode_header};
use crate::stream::qemu::ram::{self, EOS_RECORD, PageAt, Record};
use crate::stream::qemu::section::{
    SectionName, encode_end, encode_eof, encode_footer, encode_full, encode_part, encode_start,
    encode_vm_description,
};
use crate::units::BlockOffset;

const RAM_ID: u32 = 2;
const DEVICE_ID: u32 = 5;

/// What it does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Setup,
    /// A page a step, while the guest runs.
    Live,
    /// The same while it is paused: the last pages of a checkpoint.
    Pages,
    State,
    AwaitReady,
    /// The guest runs until this step.
    Run(u64),
    AwaitReply,
    AwaitReceived,
    AwaitLoaded,
    /// The standby is lost.
    Alone,
}

pub(super) struct Primary {
    pub(super) memory: BTreeMap<Page, u64>,
    pub(super) device: u64,
    dirty: BTreeSet<Page>,
    pub(super) step: Step,
    /// The checkpoint that is sent, or was sent last.
    pub(super) number: u64,
    pub(super) safe: u64,
    pub(super) runs: bool,
    pub(super) lives: bool,
}

impl Primary {
    pub(super) fn new(memory: BTreeMap<Page, u64>) -> Self {
        let dirty = memory.keys().copied().collect();
        Self { memory, device: 0, dirty, step: Step::Setup, number: 1, safe: 0, runs: true, lives: true }
    }

    pub(super) fn is_in_checkpoint(&self) -> bool {
        self.number > 1 && matches!(self.step, Step::Pages | Step::State | Step::AwaitReceived)
    }
}

/// The device section and its payload's place are known to [`device_in`].
fn device_section(device: u64) -> Vec<u8> {
    let mut out = Vec::new();
    encode_full(&SectionName { id: DEVICE_ID, idstr: "dev", instance: 0, version: 1 }, &mut out);
    out.extend_from_slice(&device.to_be_bytes());
    encode_footer(DEVICE_ID, &mut out);
    encode_eof(&mut out);
    out
}

/// The device that this state is of.
pub(super) fn device_in(state: &[u8]) -> Option<u64> {
    let head = 1 + 4 + 4 + 8;
    state.get(head..head + 8).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes)
}

fn name(block: usize) -> String {
    format!("b{block}")
}

impl World {
    pub(super) fn guest_steps(&mut self) {
        if !self.primary.runs {
            return;
        }
        self.primary.device += 1;
        if self.rng.one_in(self.plan.writes_every) {
            let block = self.rng.below(self.plan.blocks.len() as u64) as usize;
            let page = (block, self.rng.below(self.plan.blocks[block]));
            let value = if self.rng.one_in(5) { 0 } else { self.rng.next() | 1 };
            self.primary.memory.insert(page, value);
            self.primary.dirty.insert(page);
        }
    }

    fn sends(&mut self, bytes: &[u8]) {
        if self.is_connected {
            self.forward.extend(bytes);
        }
    }

    pub(super) fn primary_steps(&mut self) {
        if !self.is_connected && self.primary.step != Step::Alone {
            self.primary.step = Step::Alone;
        }
        match self.primary.step {
            Step::Setup => self.sets_up(),
            Step::Live if self.rng.one_in(8) || self.primary.dirty.is_empty() => self.pauses(),
            Step::Pages if self.primary.dirty.is_empty() => {
                let mut out = Vec::new();
                encode_end(RAM_ID, &mut out);
                out.extend_from_slice(&EOS_RECORD);
                encode_footer(RAM_ID, &mut out);
                if self.primary.number > 1 {
                    encode_eof(&mut out);
                }
                self.sends(&out);
                self.primary.step = Step::State;
            }
            Step::Live | Step::Pages => self.sends_page(),
            Step::State => self.sends_state(),
            Step::AwaitReady => self.hears(ColoMessage::Ready),
            Step::Run(until) if self.now >= until => {
                self.primary.number += 1;
                self.sends(&ColoMessage::Request.encode());
                self.primary.step = Step::AwaitReply;
            }
            Step::AwaitReply => self.hears(ColoMessage::Reply),
            Step::AwaitReceived => self.hears(ColoMessage::Received),
            Step::AwaitLoaded => self.hears(ColoMessage::Loaded),
            // Its operator says that the secondary is dead.
            Step::Alone => self.primary.runs |= self.rng.one_in(20),
            Step::Run(_) => {}
        }
    }

    fn sets_up(&mut self) {
        let mut out = Vec::new();
        encode_header(&mut out);
        encode_configuration(&Configuration { machine: "none".into(), ..Default::default() }, &mut out);
        if self.plan.says_colo {
            Command::EnableColo.encode(&mut out);
        }
        encode_start(
            &SectionName { id: RAM_ID, idstr: ram::IDSTR, instance: 0, version: ram::VERSION },
            &mut out,
        );
        let announced = |(block, pages): (usize, &u64)| BlockAnnouncement {
            name: BlockName::new(&name(block)).unwrap(),
            used_length: pages * 4096,
            host_page: None,
            guest_addr: None,
        };
        let blocks: Vec<_> = self.plan.blocks.iter().enumerate().map(announced).collect();
        encode_block_list(&blocks, &mut out);
        out.extend_from_slice(&EOS_RECORD);
        encode_footer(RAM_ID, &mut out);
        self.sends(&out);
        self.primary.step = Step::Live;
    }

    /// One page in a section of its own. QEMU sends all of a checkpoint in one END; more sections mean the same.
    fn sends_page(&mut self) {
        let Some((block, page)) = self.primary.dirty.pop_first() else { return };
        let value = self.primary.memory[&(block, page)];
        let mut out = Vec::new();
        encode_part(RAM_ID, &mut out);
        let named = name(block);
        let at = PageAt { block: Some(&named), offset: BlockOffset(page * 4096) };
        match value {
            0 => Record::Zero { at, fill: 0 }.encode(&mut out),
            value => {
                Record::Page(at).encode(&mut out);
                let mut bytes = [0; 4096];
                bytes[..8].copy_from_slice(&value.to_be_bytes());
                out.extend_from_slice(&bytes);
            }
        }
        out.extend_from_slice(&EOS_RECORD);
        encode_footer(RAM_ID, &mut out);
        self.sends(&out);
    }

    /// What the checkpoint is of.
    fn pauses(&mut self) {
        self.primary.runs = false;
        self.moments.insert(self.primary.number, (self.primary.memory.clone(), self.primary.device));
        self.primary.step = Step::Pages;
    }

    fn sends_state(&mut self) {
        let state = device_section(self.primary.device);
        if self.primary.number > 1 {
            let mut out = Vec::new();
            encode_size(state.len() as u64, &mut out);
            self.sends(&out);
            self.sends(&state);
            self.primary.step = Step::AwaitReceived;
            return;
        }
        let mut out = state;
        let json = br#"{"devices": [{"name": "dev", "instance_id": 0, "size": 8}]}"#;
        encode_vm_description(json, &mut out);
        self.sends(&out);
        self.primary.step = Step::AwaitReady;
    }

    fn hears(&mut self, due: ColoMessage) {
        if self.back.len() < MESSAGE_LEN {
            return;
        }
        let bytes: Vec<u8> = self.back.drain(..MESSAGE_LEN).collect();
        let message = ColoMessage::decode(&bytes).unwrap();
        self.findings.must(message == due, "the standby answers out of turn");
        let next = Step::Run(self.now + self.rng.below(self.plan.delay));
        match due {
            ColoMessage::Reply => {
                self.pauses();
                self.sends(&ColoMessage::Send.encode());
            }
            ColoMessage::Received => self.primary.step = Step::AwaitLoaded,
            _ => {
                self.findings.saw("safe");
                self.primary.safe = self.primary.number;
                (self.primary.runs, self.primary.step) = (true, next);
            }
        }
    }
}
