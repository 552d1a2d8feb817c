//! How a migration ended at the destination.

use crate::engine::Ending;
use crate::error::Chain;
use crate::observe::{PageCounts, Statistics, Status};

use super::postcopy::MissingPages;
use super::{DestinationSession, Incoming};
use crate::session::callback::quietly;
use crate::session::relay::ScanReport;
use crate::session::{Error, MemoryCheck};

/// How a migration ended, as the destination knows it.
#[derive(Debug)]
#[non_exhaustive]
pub struct DestinationReport {
    /// Whether the guest runs here.
    pub ending: Ending,
    /// Why not.
    pub error: Option<Error>,
    /// The source's announcements, if they arrived.
    pub incoming: Option<Incoming>,
    /// Pages that arrived.
    pub pages: PageCounts,
    /// Of the whole pages, those that were written through the backing file, since they were not mapped here: the
    /// process takes a fault at each when it first touches them.
    pub pages_by_file: u64,
    /// Of them, those that were mapped since, by an otherwise idle thread.
    pub pages_mapped_in_background: u64,
    /// Bytes that arrived, in the stream and on page channels; not those that a NIC wrote.
    pub bytes: u64,
    /// A digest, or fingerprints of all pages, were compared before the guest was handed over, and found equal.
    pub verified: bool,
    /// The result of the source's memory check once the guest ran here; `None` if it was not made
    /// ([`Verify::Fast`](crate::session::Verify::Fast)).
    pub memory_check: Option<MemoryCheck>,
    /// The source is a ramwire.
    pub native: bool,
    /// Cost of finding pages by their content: upstream of a relay, if they arrived by RDMA.
    pub scan: Option<ScanReport>,
    /// Figures of the faults at missing pages, if the source switched to postcopy. At a relay no guest faults: only the
    /// pages on the source's connection for urgent ones are counted.
    pub missing_pages: Option<MissingPages>,
    /// The figures.
    pub statistics: Statistics,
}

impl DestinationSession {
    /// The connection and the threads end.
    pub(super) fn report(mut self, ending: Ending, bytes: u64) -> DestinationReport {
        self.close_link(ending);
        self.keepalive.join();
        let (missing_pages, preempt_bytes) = self.end_postcopy(ending);
        let arrived = self.ingest.finish();
        let bytes = bytes + preempt_bytes + self.wire.channel_bytes();
        let error = self.error.as_ref();
        let told = |s: &mut Statistics| {
            s.status = match ending {
                Ending::Running => Status::Completed,
                Ending::Stranded | Ending::Incomplete | Ending::Unanswered => Status::InDoubt,
                Ending::Discarded if matches!(error, Some(Error::Cancelled)) => Status::Cancelled,
                Ending::Discarded => Status::Failed,
            };
            s.ended = true;
            s.error = error.map(|error| Chain(error).to_string());
        };
        let statistics = self.figures.shared();
        self.figures.end(ending == Ending::Running);
        quietly("reporting the end", || statistics.update(told));
        quietly("reporting the end", || statistics.cleaned_up());
        DestinationReport {
            ending,
            error: self.error,
            pages: arrived.pages,
            pages_by_file: arrived.by_file,
            pages_mapped_in_background: arrived.mapped_in_background,
            incoming: arrived.incoming,
            bytes,
            verified: self.reported.digests.verified() || self.reported.compared.verified(),
            memory_check: self.reported.compared.check.take(),
            native: self.driver.engine.is_native(),
            scan: arrived.scan,
            missing_pages,
            statistics: statistics.snapshot(),
        }
    }
}
