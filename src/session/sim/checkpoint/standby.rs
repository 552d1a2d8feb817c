//! The standby's host: its engine, and its cache with memory of its own.

use std::sync::Arc;
use std::time::Duration;

use super::plan::{Answer, Page, Plan, Sent, Way};
use super::world::World;
use crate::engine::{CheckpointBreakage, StandbyAction, StandbyEnding, StandbyEngine, StandbyEvent};
use crate::guest::{CheckpointCache, MappedGuest};
use crate::ram::{BlockName, PageRun, RamBlock};
use crate::sys::Mapping;
use crate::units::{BlockIndex, PageIndex, PageSize};

/// The standby's host.
pub(super) struct Standby {
    pub(super) engine: StandbyEngine,
    pub(super) guest: Arc<MappedGuest>,
    pub(super) cache: CheckpointCache,
    pub(super) doing: Option<StandbyAction>,
    pub(super) come: u64,
    pub(super) device: u64,
    pub(super) was_released: bool,
    pub(super) has_greeted: bool,
    /// Parts of checkpoints that were applied.
    applied_parts: u64,
    /// The first command of its embedder: the guest is to start.
    pub(super) is_to_start: Option<bool>,
    pub(super) is_torn: bool,
    pub(super) runs: bool,
    pub(super) lives: bool,
    pub(super) ending: Option<StandbyEnding>,
}

impl Standby {
    pub(super) fn new(plan: &Plan, breakage: CheckpointBreakage) -> Self {
        let mut builder = MappedGuest::builder(PageSize::SIZE_4K);
        for (index, pages) in plan.blocks.iter().enumerate() {
            let name = BlockName::new(&format!("b{index}")).unwrap();
            let mapping = Mapping::anonymous(pages * 4096).unwrap();
            builder = builder.mapping(RamBlock::new(name, pages * 4096), &mapping);
        }
        let guest = Arc::new(builder.build().unwrap());
        let mut cache = CheckpointCache::new(guest.clone()).unwrap();
        cache.break_order(
            breakage == CheckpointBreakage::PlaceEarly,
            breakage == CheckpointBreakage::StateEarly,
        );
        let mut engine = StandbyEngine::new(plan.leasing.is_some());
        engine.break_order(breakage);
        Self {
            engine,
            guest,
            cache,
            doing: None,
            come: 0,
            device: 0,
            was_released: false,
            has_greeted: false,
            applied_parts: 0,
            is_to_start: None,
            is_torn: false,
            runs: false,
            lives: true,
            ending: None,
        }
    }
}

impl World {
    pub(super) fn answer(&mut self, event: StandbyEvent) {
        self.standby.doing = None;
        self.standby_hears(event);
    }

    /// An event that is no answer to an action.
    pub(super) fn standby_hears(&mut self, event: StandbyEvent) {
        self.standby.engine.handle(self.plan.clock(self.now, 1), event);
    }

    /// Nothing has come: the lease may have run out.
    fn standby_waits(&mut self) {
        if self.standby.engine.wake_at().is_some_and(|at| self.plan.clock(self.now, 1) >= at) {
            self.standby.is_to_start.get_or_insert(true);
            self.findings.saw("the lease has run out at the standby");
            self.standby_hears(StandbyEvent::Time);
        }
    }

    pub(super) fn standby_steps(&mut self) {
        if self.standby.ending.is_some() {
            return;
        }
        let Some(action) = self.standby.doing.or_else(|| self.standby.engine.poll()) else {
            return self.standby_waits();
        };
        self.standby.doing = Some(action);
        match action {
            StandbyAction::Receive => return self.receive(),
            StandbyAction::Grant(number) => self.answers(Answer::Grant(number)),
            StandbyAction::TellDiscarded => self.answers(Answer::Discarded),
            StandbyAction::Confirm(number) => self.answers(Answer::Confirm(number)),
            StandbyAction::Apply(_) if self.apply_fails() => {
                self.findings.saw("memory could not be written to");
                self.standby.is_torn = true;
                return self.answer(StandbyEvent::Failed);
            }
            // A page a step.
            StandbyAction::Apply(_) if !self.standby.cache.apply(1).unwrap() => {
                // A command may have ended it.
                self.standby.doing = None;
                if self.standby.engine.is_applying() {
                    self.standby.doing = Some(action);
                }
                return;
            }
            StandbyAction::TellTaken => {
                self.answers(Answer::Taken);
                self.is_connected = false;
            }
            StandbyAction::Load if self.plan.load_fails => {
                self.findings.saw("the device state could not be loaded");
                return self.answer(StandbyEvent::Failed);
            }
            StandbyAction::Load => {
                let state = self.standby.cache.state();
                self.standby.device = state.try_into().map_or(0, u64::from_be_bytes);
            }
            StandbyAction::Start => self.starts(),
            StandbyAction::AnswerRelease => self.answers(Answer::Released),
            StandbyAction::Finish(ending) => {
                self.standby.ending = Some(ending);
                self.is_connected &= ending != StandbyEnding::Discarded;
                return;
            }
            StandbyAction::Greet => self.standby.has_greeted = true,
            StandbyAction::Apply(_) => {}
        }
        self.answer(StandbyEvent::Done);
    }

    fn apply_fails(&mut self) -> bool {
        self.standby.applied_parts += 1;
        self.plan.apply_fails == Some(self.standby.applied_parts)
    }

    fn answers(&mut self, answer: Answer) {
        if self.is_connected && !self.is_hole(Way::Back) {
            self.back.push_back(answer);
        }
    }

    fn receive(&mut self) {
        let is_late = self.is_stalled(Way::Forward);
        let message = match if is_late { None } else { self.forward.pop_front() } {
            Some(message) => message,
            None if !self.is_connected && !is_late => return self.answer(StandbyEvent::Lost),
            // A command ends the wait, or the lease.
            None => {
                self.standby_waits();
                return self.answer(StandbyEvent::Done);
            }
        };
        let event = match message {
            Sent::Open(number) => {
                self.standby.come = 0;
                StandbyEvent::Opened(number)
            }
            Sent::Page((block, page), value) => {
                let run = PageRun { block: BlockIndex(block as u32), first: PageIndex(page), pages: 1 };
                let landing = self.standby.cache.admit(run).unwrap();
                if value == 0 {
                    self.standby.cache.zero(landing);
                } else {
                    let span = self.standby.cache.target(landing).unwrap();
                    span.part(0, 8).unwrap().copy_from(&value.to_be_bytes());
                    self.standby.cache.commit(landing);
                }
                self.standby.come += 1;
                StandbyEvent::Done
            }
            Sent::State(device) => {
                self.standby.cache.set_state(device.to_be_bytes().into());
                StandbyEvent::Done
            }
            Sent::Close(number, pages) if pages == self.standby.come => StandbyEvent::Whole(number),
            Sent::Close(..) => StandbyEvent::Failed,
            Sent::Renew(number) => {
                let time = self.plan.leasing.map_or(Duration::ZERO, |leasing| leasing.config.time);
                StandbyEvent::Asked { number, time }
            }
            Sent::Release => {
                self.standby.was_released = true;
                StandbyEvent::Released
            }
        };
        self.answer(event);
    }

    /// The guest starts at the standby: it must be the one of a checkpoint, and no earlier than what was let out.
    fn starts(&mut self) {
        self.findings.saw("the guest starts at the standby");
        self.standby.runs = true;
        let number = self.standby.engine.applied();
        if self.standby.cache.pages() > 0 {
            self.findings.saw("a part of the next checkpoint is dropped");
        }
        let safe = self.source.safe;
        self.findings.must(number >= safe, "what was let out is contradicted");
        let Some((memory, device)) = self.moments.get(&number).cloned() else {
            return self.findings.must(false, "the guest starts from no checkpoint");
        };
        let same = memory.iter().all(|(page, value)| self.page_at_standby(*page) == *value);
        self.findings.must(same, "memory is of no moment");
        self.findings.must(self.standby.device == device, "the device state is of another moment");
    }

    fn page_at_standby(&self, (block, page): Page) -> u64 {
        let region = self.standby.guest.region(BlockIndex(block as u32)).unwrap();
        let mut bytes = [0; 8];
        region.span(page * 4096, 8).unwrap().copy_to(&mut bytes);
        u64::from_be_bytes(bytes)
    }
}
