//! What a snapshot's engine asks for, and what it is told.

use std::time::Duration;

use crate::ram::{PageRun, PageSet};

/// Where a copy lies until it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Room for one target page.
    Slot,
    /// Room for as many neighbours as [`SnapshotConfig::tray_pages`].
    Tray,
}

/// What a snapshot is given.
#[derive(Clone, Debug)]
pub struct SnapshotConfig {
    /// Places for single pages that the guest waits to write.
    pub slots: u64,
    /// Places for runs.
    pub trays: u64,
    /// Target pages of a tray: a power of two, no less than the largest host page.
    pub tray_pages: u64,
    /// Most target pages that are protected by one action: a power of two, no less than the largest host page.
    pub protect_pages: u64,
    /// Target pages that a write before the moment opens: a power of two, no less than the largest host page.
    pub lift_pages: u64,
    /// The guest is paused as soon as what is left to protect takes no longer, if that can be reached.
    pub pause_goal: Duration,
    /// Without a free place for so long, while pages are to be copied, the snapshot fails.
    pub stall_timeout: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotAction {
    /// Write what comes before the pages. The guest runs.
    Open,
    /// Take the guest's promise to keep its memory, and get ready to protect it. Nothing is protected yet.
    Arm,
    /// Find out which pages may hold something: [`SnapshotEvent::Found`] tells of those that were not told of before.
    Look,
    /// Protect these pages.
    Protect {
        /// In whole host pages.
        run: PageRun,
    },
    /// Begin to pause the guest, on another thread, since the guest's writes are served here until it stands still:
    /// [`SnapshotEvent::Returned`] comes later. The same with the next two.
    Pause,
    /// Begin to save its device state.
    SaveState,
    /// Begin to let the guest run.
    Resume,
    /// Copy these pages and hand the copy over.
    Copy {
        /// In whole host pages.
        run: PageRun,
        /// Where to.
        place: Place,
    },
    /// Lift the protection of these pages; whoever waits for them runs on.
    Lift {
        /// In whole host pages.
        run: PageRun,
    },
    /// Lift all protection.
    Disarm,
    /// Write what comes behind the pages, and make it last.
    Close,
    /// Leave nothing that claims to be whole.
    Abandon,
    /// It is over.
    Finish(SnapshotOutcome),
}

/// What has happened.
#[derive(Clone, Debug)]
pub enum SnapshotEvent {
    /// Start.
    Begin,
    /// The action is done.
    Done,
    /// The action [`SnapshotAction::Look`] is done: pages that may hold something, in whole host pages, without those of
    /// earlier answers.
    Found(PageSet),
    /// The action could not be done.
    Failed,
    /// What was begun by [`SnapshotAction::Pause`], [`SnapshotAction::SaveState`] or [`SnapshotAction::Resume`] is over.
    Returned {
        /// It was done.
        done: bool,
    },
    /// A thread waits to write this host page.
    Fault(PageRun),
    /// A copy has left.
    Freed(Place),
    /// What takes the copies takes no more.
    Lost,
    /// Somebody asks for the end.
    Cancel,
    /// Nothing but time has passed.
    Time,
}

/// How a snapshot ended. The guest runs on, whatever it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOutcome {
    /// It is whole where it was written to.
    Taken,
    /// It could not be taken.
    Failed,
    /// Somebody asked for the end.
    Cancelled,
}

/// Orders that a test leaves out.
#[cfg(test)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum SnapshotBreakage {
    #[default]
    None,
    /// Protection is lifted before the page is copied.
    LiftFirst,
    /// A page that was copied for its writer is copied again in its turn.
    CopyTwice,
    /// The guest runs on before its memory is protected.
    ResumeUnprotected,
    /// A failure leaves the protection on.
    StayProtected,
    /// A failure leaves the guest paused.
    StayPaused,
    /// What was written is made last while the guest's resume may still fail.
    CloseUnresumed,
    /// What a write before the moment has opened is not protected again.
    LeaveOpen,
    /// Memory that is in use only since the first look is not looked for again.
    LookOnce,
    /// Nobody is let through while the guest is being paused.
    DeafWhilePausing,
}
