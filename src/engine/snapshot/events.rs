//! Actions that a snapshot's engine requests, and events that it receives.

use std::time::Duration;

use crate::ram::{PageRun, PageSet};

/// Where a copy is kept until it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Room for one target page.
    Slot,
    /// Room for as many neighbours as [`SnapshotConfig::tray_pages`].
    Tray,
}

/// Settings of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotConfig {
    /// Places for single pages that the guest waits to write.
    pub slots: u64,
    /// Places for runs.
    pub trays: u64,
    /// Target pages of a tray: a power of two, no less than the largest host page.
    pub tray_pages: u64,
    /// Maximum number of target pages that are protected by one action: a power of two, no less than the largest host
    /// page.
    pub protect_pages: u64,
    /// Target pages that a write before the moment opens: a power of two, no less than the largest host page.
    pub lift_pages: u64,
    /// The guest is paused as soon as protecting the rest takes no longer, if that can be reached.
    pub pause_goal: Duration,
    /// Without a free place for so long, while pages are to be copied, the snapshot fails.
    pub stall_timeout: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotAction {
    /// Write the part before the pages. The guest runs.
    Open,
    /// Turn the dirty sources on, if the changes after the snapshot are to be known and they are not on.
    Track,
    /// Take the guest's promise to keep its memory, and get ready to protect it. Nothing is protected yet.
    Arm,
    /// Find out which pages may hold data: [`SnapshotEvent::Found`] reports those that were not reported before.
    Look,
    /// Protect these pages.
    Protect {
        /// In whole host pages.
        run: PageRun,
    },
    /// Begin to pause the guest, on another thread, since its writes are served here until it is paused:
    /// [`SnapshotEvent::Returned`] follows later. The same holds for the next two.
    Pause,
    /// Begin to save its device state.
    SaveState,
    /// Begin to resume the guest.
    Resume,
    /// Copy these pages and hand the copy over.
    Copy {
        /// In whole host pages.
        run: PageRun,
        /// The place of the copy.
        place: Place,
    },
    /// Lift the protection of these pages; threads that wait for them continue.
    Lift {
        /// In whole host pages.
        run: PageRun,
    },
    /// Lift all protection.
    Disarm,
    /// Write the part after the pages, and make it durable.
    Close,
    /// Leave nothing that claims to be whole.
    Abandon,
    /// It is over.
    Finish(SnapshotOutcome),
}

/// Events.
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
    /// The call that [`SnapshotAction::Pause`], [`SnapshotAction::SaveState`] or [`SnapshotAction::Resume`] began has
    /// returned.
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
    /// The end is requested.
    Cancel,
    /// Nothing but time has passed.
    Time,
}

/// How a snapshot ended. The guest continues in every case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotOutcome {
    /// It is whole where it was written to.
    Taken,
    /// It could not be taken.
    Failed,
    /// The end was requested.
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
    /// The guest continues before its memory is protected.
    ResumeUnprotected,
    /// A failure leaves the protection on.
    StayProtected,
    /// A failure leaves the guest paused.
    StayPaused,
    /// The output is made durable while the guest's resume may still fail.
    CloseUnresumed,
    /// What a write before the moment has opened is not protected again.
    LeaveOpen,
    /// Memory that is in use only since the first look is not found.
    LookOnce,
    /// No thread is let through while the guest is being paused.
    DeafWhilePausing,
    /// Changes are logged only once all pages are copied.
    TrackLate,
    /// What a snapshot that failed has read from the log is left out of the next one.
    ForgetFailed,
    /// A base is kept although a part of the log is lost.
    TrustLostLog,
}
