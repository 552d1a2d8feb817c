//! The form in which a page is sent: zero or whole, or left to the transport.

use crate::guest::{GuestError, GuestMemory, span_of};
use crate::ram::{PageBatch, PageRun, Verdict};
use crate::sys::{is_zero, look_ahead};
use crate::units::PageIndex;

/// Where zero pages are found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZeroDetection {
    /// Nowhere: every page travels whole.
    None,
    /// In the page loop, before a page is passed to the transport.
    Legacy,
    /// On the threads of the transport's channels, if it has any and the peer supports it; otherwise in the page loop.
    #[default]
    Channels,
}

impl ZeroDetection {
    /// The effective setting for a transport that detects zero pages itself, or does not.
    #[must_use]
    pub fn with(self, transport_looks: bool) -> Self {
        if self == Self::Channels && !transport_looks { Self::Legacy } else { self }
    }
}

/// Scans the pages of `run`, whose dirty bits are cleared, and adds them to `batch`.
///
/// The bytes are read in place. A page written after it was found zero is marked dirty by that write and sent again.
///
/// # Errors
/// [`GuestError`] if the run is not in the guest.
pub fn classify(
    guest: &dyn GuestMemory,
    run: PageRun,
    detection: ZeroDetection,
    batch: &mut PageBatch,
) -> Result<(), GuestError> {
    let landing = guest.table().admit_run(run)?;
    match detection {
        ZeroDetection::None => {
            batch.push(run, Verdict::Whole);
            return Ok(());
        }
        ZeroDetection::Channels => {
            batch.push(run, Verdict::Unknown);
            return Ok(());
        }
        ZeroDetection::Legacy => {}
    }
    let span = span_of(guest, landing)?;
    let page = guest.table().page().bytes() as usize;
    let verdict_at = |index: u64| {
        look_ahead(span, index as usize, page);
        match span.part(index as usize * page, page) {
            Some(span) if is_zero(span) => Verdict::Zero,
            _ => Verdict::Whole,
        }
    };
    let mut first = 0;
    let mut verdict = verdict_at(0);
    for index in 1..run.pages {
        let next = verdict_at(index);
        if next != verdict {
            batch.push(part(run, first, index), verdict);
            (first, verdict) = (index, next);
        }
    }
    batch.push(part(run, first, run.pages), verdict);
    Ok(())
}

fn part(run: PageRun, from: u64, to: u64) -> PageRun {
    PageRun { first: PageIndex(run.first.0 + from), pages: to - from, ..run }
}
