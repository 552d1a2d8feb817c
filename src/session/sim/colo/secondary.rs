//! The standby's host: its engine, its parser, and its cache with memory of its own.

use std::sync::Arc;
use std::time::Duration;

use super::primary::device_in;
use super::world::{Page, Plan, World};
use crate::engine::{CheckpointBreakage, StandbyAction, StandbyEnding, StandbyEngine, StandbyEvent};
use crate::guest::{CheckpointCache, MappedGuest};
use crate::ram::{BlockName, RamBlock};
use crate::session::checkpoint::{ColoIntake, Taken};
use crate::stream::qemu::colo::ColoMessage;
use crate::sys::Mapping;
use crate::units::{BlockIndex, PageSize};

pub(super) struct Secondary {
    pub(super) engine: StandbyEngine,
    guest: Arc<MappedGuest>,
    intake: ColoIntake,
    pub(super) cache: Option<CheckpointCache>,
    buffer: Vec<u8>,
    pub(super) doing: Option<StandbyAction>,
    has_begun: bool,
    device: Option<u64>,
    /// Parts of checkpoints that were applied.
    applied_parts: u64,
    pub(super) is_torn: bool,
    pub(super) runs: bool,
    pub(super) ending: Option<StandbyEnding>,
    breakage: CheckpointBreakage,
}

impl Secondary {
    pub(super) fn new(plan: &Plan, breakage: CheckpointBreakage) -> Self {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for (index, pages) in plan.blocks.iter().enumerate() {
            let name = BlockName::new(&format!("b{index}")).unwrap();
            let mapping = Mapping::anonymous(pages * 4096).unwrap();
            builder = builder.mapping(RamBlock::new(name, pages * 4096), &mapping);
        }
        let mut engine = StandbyEngine::new(false);
        engine.break_order(breakage);
        engine.handle(Duration::ZERO, StandbyEvent::Begin);
        let mut intake = ColoIntake::new(1 << 20);
        intake.break_order(breakage == CheckpointBreakage::WholeWithoutState);
        Self {
            engine,
            guest: Arc::new(builder.build().unwrap()),
            intake,
            cache: None,
            buffer: Vec::new(),
            doing: None,
            has_begun: false,
            device: None,
            applied_parts: 0,
            is_torn: false,
            runs: false,
            ending: None,
            breakage,
        }
    }
}

impl World {
    fn answer(&mut self, event: StandbyEvent) {
        self.secondary.doing = None;
        self.secondary_hears(event);
    }

    pub(super) fn secondary_hears(&mut self, event: StandbyEvent) {
        self.secondary.engine.handle(Duration::from_millis(self.now), event);
    }

    fn says(&mut self, message: ColoMessage) {
        if self.is_connected {
            self.back.extend(message.encode());
        }
    }

    pub(super) fn secondary_steps(&mut self) {
        if self.secondary.ending.is_some() {
            return;
        }
        let Some(action) = self.secondary.doing.or_else(|| self.secondary.engine.poll()) else { return };
        self.secondary.doing = Some(action);
        match action {
            StandbyAction::Greet | StandbyAction::Receive => return self.receives(action),
            StandbyAction::Apply(_) if self.apply_fails() => {
                self.findings.saw("memory could not be written to");
                self.secondary.is_torn = true;
                return self.answer(StandbyEvent::Failed);
            }
            // A page a step.
            StandbyAction::Apply(_)
                if self.secondary.cache.as_mut().is_some_and(|cache| !cache.apply(1).unwrap()) =>
            {
                // A command may have ended it.
                self.secondary.doing = Some(action).filter(|_| self.secondary.engine.is_applying());
                return;
            }
            StandbyAction::Confirm(1) => self.says(ColoMessage::Ready),
            StandbyAction::Confirm(_) => self.says(ColoMessage::Loaded),
            StandbyAction::TellTaken => self.is_connected = false,
            StandbyAction::Load if self.plan.load_fails => {
                self.findings.saw("the device state could not be loaded");
                return self.answer(StandbyEvent::Failed);
            }
            StandbyAction::Load => {
                self.secondary.device =
                    self.secondary.cache.as_ref().and_then(|cache| device_in(cache.state()));
            }
            StandbyAction::Start => self.starts(),
            StandbyAction::Finish(ending) => {
                self.secondary.ending = Some(ending);
                self.is_connected = false;
                return;
            }
            // Nothing of these is said to a QEMU.
            StandbyAction::Apply(_)
            | StandbyAction::Grant(_)
            | StandbyAction::AnswerRelease
            | StandbyAction::TellDiscarded => {}
        }
        self.answer(StandbyEvent::Done);
    }

    fn apply_fails(&mut self) -> bool {
        self.secondary.applied_parts += 1;
        self.plan.apply_fails == Some(self.secondary.applied_parts)
    }

    /// Some of what is there.
    fn receives(&mut self, action: StandbyAction) {
        if action == StandbyAction::Receive && !std::mem::replace(&mut self.secondary.has_begun, true) {
            return self.answer(StandbyEvent::Opened(1));
        }
        let come = self.rng.below(self.forward.len() as u64 + 1).min(6000) as usize;
        self.secondary.buffer.extend(self.forward.drain(..come));
        loop {
            let Secondary { intake, buffer, cache, .. } = &mut self.secondary;
            let (used, taken) = intake.take(buffer, cache.as_mut()).unwrap();
            buffer.drain(..used);
            match taken {
                Taken::Kept | Taken::Ping(_) => {}
                Taken::More(_) if self.forward.is_empty() && !self.is_connected => {
                    return self.answer(StandbyEvent::Lost);
                }
                // A command ends the wait.
                Taken::More(_) if action == StandbyAction::Receive => return self.answer(StandbyEvent::Done),
                Taken::More(_) => return,
                Taken::Guest => return self.greets(),
                Taken::Tell(event, answer) => {
                    answer.into_iter().for_each(|answer| self.says(answer));
                    return self.answer(event);
                }
            }
        }
    }

    fn greets(&mut self) {
        let mut cache = self.secondary.intake.place_in(self.secondary.guest.clone()).unwrap();
        let breakage = self.secondary.breakage;
        cache.break_order(
            breakage == CheckpointBreakage::PlaceEarly,
            breakage == CheckpointBreakage::StateEarly,
        );
        self.secondary.cache = Some(cache);
        self.answer(StandbyEvent::Done);
    }

    /// It must be the guest of a checkpoint, and no earlier than what the primary was told.
    fn starts(&mut self) {
        self.findings.saw("the guest starts at the standby");
        self.secondary.runs = true;
        let number = self.secondary.engine.applied();
        if self.secondary.cache.as_ref().is_some_and(|cache| cache.pages() > 0) {
            self.findings.saw("a part of the next checkpoint is dropped");
        }
        self.findings.must(number >= self.primary.safe, "what was let out is contradicted");
        let Some((memory, device)) = self.moments.get(&number).cloned() else {
            return self.findings.must(false, "the guest starts from no checkpoint");
        };
        let same = memory.iter().all(|(page, value)| self.page_here(*page) == *value);
        self.findings.must(same, "memory is of no moment");
        self.findings.must(self.secondary.device == Some(device), "the device state is of another moment");
    }

    fn page_here(&self, (block, page): Page) -> u64 {
        let region = self.secondary.guest.region(BlockIndex(block as u32)).unwrap();
        let mut bytes = [0; 8];
        region.span(page * 4096, 8).unwrap().copy_to(&mut bytes);
        u64::from_be_bytes(bytes)
    }
}
