//! Orders that tests switch off.

/// Orders that tests leave out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(crate) enum FillBreakage {
    #[default]
    None,
    /// A page counts as placed when a reader takes it.
    WholeWhenRead,
    /// Pages that could not be read are not read again.
    ForgetFailed,
    /// A page is given to readers repeatedly until it is placed.
    GiveTwice,
    /// A fault is forgotten once a reader takes its page.
    ForgetWaiting,
    /// What a failed read has left in its buffer is placed.
    PlaceFailed,
    /// Pages that are granted behind later ones are not read.
    PassWithheld,
    /// A page that a thread waited for before it could be read is not read first.
    ForgetWithheld,
    /// Threads that wait when nothing can be read any more are forgotten.
    ForgetOutstanding,
}

impl FillBreakage {
    pub(super) fn is(self, order: Self) -> bool {
        cfg!(test) && self == order
    }
}
