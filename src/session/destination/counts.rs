//! What the source has reported about itself and what it has sent: page channels are compared before the first page,
//! pages before READY.

use crate::engine::{agree_on_channels, compare_counts};
use crate::error::Remedy;
use crate::observe::PageCounts;
use crate::ram::PageSet;
use crate::session::{Breakage, Error, PassedBlock};
use crate::stream::native::channels_of_ping;
use crate::stream::page_counts;
use crate::stream::qemu::file::{Configuration, IGNORE_SHARED};
use crate::stream::qemu::packet_numbers::MissingPackets;
use crate::transport::ChannelError;

use super::DestinationSession;
use super::digests::Digests;
use super::fingerprints::Compared;
use super::receive::out_of_turn;

/// The order behind the counts of a round.
pub(super) const FENCE: &str = "FENCE";

/// What the source has reported about itself and about the pages it sent.
#[derive(Debug, Default)]
pub(super) struct SourceReports {
    /// It reads answers.
    pub(super) return_path: bool,
    /// It waits for no answer, and closed its connection before its last byte.
    pub(super) left: bool,
    pub(super) configuration: Option<Configuration>,
    /// A ramwire sent the greeting, so that it understands REFUSED.
    pub(super) greeted: bool,
    pub(super) migration_id: Option<[u8; 16]>,
    /// Its page channels.
    channels: u8,
    pub(super) vmm_configuration: Vec<u8>,
    /// It passes memory, which this end takes; what has come of it.
    pub(super) passes: bool,
    pub(super) passed: Vec<PassedBlock>,
    /// Pages of a postcopy come on its page channels, too.
    pub(super) spread: bool,
    /// All memory came ahead of the stream.
    pub(super) passed_ahead: bool,
    /// Pages it has sent.
    sent: Option<Vec<PageCounts>>,
    /// Pages placed on each page channel up to the last barrier, which a fence follows.
    pub(super) at_barrier: Vec<PageCounts>,
    /// Bytes that came as zero in rounds by another link than the stream.
    pub(super) zero_in_rounds: u64,
    /// Pages that it has not sent in their last state.
    pub(super) unsent: PageSet,
    pub(super) digests: Digests,
    pub(super) compared: Compared,
}

impl SourceReports {
    /// The guest runs on at the source, which has connected again and will tell all of this again. It counts from zero.
    pub(super) fn forget_switchover(&mut self) {
        (self.sent, self.zero_in_rounds) = (None, 0);
        self.at_barrier.clear();
        self.unsent = PageSet::default();
        self.digests = Digests::default();
        self.compared.forget_switchover();
    }

    /// A PING may carry the number of page channels.
    pub(super) fn ping(&mut self, value: u32) {
        self.channels = channels_of_ping(value).unwrap_or(self.channels);
    }
}

/// The source has a page channel that is not read here.
pub(super) fn more_channels_there(MissingPackets { sent, arrived }: MissingPackets) -> Error {
    Error::Config {
        what: format!(
            "the source has more page channels than this end: of {sent} packets that it has sent on them \
            {arrived} have arrived"
        ),
        remedy: Remedy::AlignChannels,
    }
}

/// The source has page channels, and this end none.
pub(super) fn no_channels_here() -> Error {
    Error::Config {
        what: "the source sends pages on channels of their own (multifd)".into(),
        remedy: Remedy::AskForChannels,
    }
}

impl DestinationSession {
    /// A connection that is not read loses its pages, and one that does not exist would be waited for in vain.
    pub(super) fn agree_on_channels(&mut self) -> Result<(), Error> {
        let ours = self.wire.link.abilities().page_channels;
        Ok(agree_on_channels(self.reported.channels, ours)?)
    }

    /// Packets of page channels that were sent and have not arrived. A ramwire has sent the number of its channels, and
    /// reports each page.
    pub(super) fn check_packets(&mut self) -> Result<(), Error> {
        let missing = self.wire.link.missing_packets().filter(|_| !self.driver.engine.is_native());
        missing.map_or(Ok(()), |missing| Err(more_channels_there(missing)))
    }

    /// A QEMU sends nothing between two rounds while it waits for its operator (pause-before-switchover); the footer of
    /// the last round may still be in its buffer then. Such a QEMU has sent pages before. One from which no page has
    /// arrived may be waiting until its page channels are read. A ramwire sends keepalives.
    pub(super) fn may_hold_its_switchover(&mut self) -> bool {
        self.ingest.sections().between_rounds() && !self.driver.engine.is_native() && !self.nothing_received()
    }

    /// Not one whole page has come in the stream, which is the only way here, and some pages are missing.
    fn nothing_received(&mut self) -> bool {
        let able = self.wire.link.abilities();
        if able.page_channels > 0 || able.has_rounds {
            return false;
        }
        let Some(placing) = self.ingest.placed() else { return false };
        let PageCounts { normal, delta, .. } = placing.in_stream();
        normal == 0 && delta == 0 && placing.placer().missing_pages() > 0
    }

    /// What the silence of a source may come from, where it is more than that.
    pub(super) fn silence_of_source(&mut self, error: Error) -> Error {
        let Error::Channel(ChannelError::Stalled { after, .. }) = error else { return error };
        if let Err(why) = self.check_packets() {
            return why;
        }
        if self.driver.engine.is_native() || !self.nothing_received() {
            return error;
        }
        Error::Config {
            what: format!(
                "the source has sent no page and then nothing for {} s; it may have page channels (multifd) \
                that are not read here",
                after.as_secs_f64()
            ),
            remedy: Remedy::AskForChannels,
        }
    }

    /// RAM has ended, and not one whole page of it arrived in the stream, and some pages not at all: they were sent on
    /// page channels that are not read. If the barriers of a QEMU are no records (7.2), nothing else shows that it has
    /// page channels. The pages that a guest need not send, such as free pages, are never all pages with contents.
    pub(super) fn refuse_unread_channels(&mut self) -> Result<(), Error> {
        // Only next to a socket can there be connections that are not read.
        let alone = self.wire.link.stream().descriptor().is_none();
        let able = self.wire.link.abilities();
        let beside = alone || able.page_channels > 0 || able.has_rounds;
        let some_stay = self
            .reported
            .configuration
            .as_ref()
            .is_some_and(|configuration| configuration.has(IGNORE_SHARED));
        if beside || some_stay || self.switch.is_advised() || self.driver.engine.is_native() {
            return Ok(());
        }
        let placing = self.ingest.placing()?;
        let PageCounts { normal, delta, zero } = placing.in_stream();
        // A source with page channels that are not read sends its zero pages in the stream; a source that sends no page
        // at all has none to lose.
        if zero == 0 || normal > 0 || delta > 0 || placing.placer().missing_pages() == 0 {
            return Ok(());
        }
        Err(no_channels_here())
    }

    /// SENT: kept until all that it counts has come.
    pub(super) fn source_sent(&mut self, counts: &[u8]) -> Result<(), Error> {
        let due = self.ingest.sections().ram_ended() || self.resumption.is_agreed();
        if !due || !self.driver.engine.is_native() {
            return Err(out_of_turn("SENT", "waiting for the last page of a ramwire"));
        }
        self.reported.sent = Some(page_counts::decode(counts));
        Ok(())
    }

    /// All in front of `order` has come, `on_channels` on each page channel: is it what was sent?
    pub(super) fn compare_counts(&mut self, on_channels: Vec<PageCounts>, order: &str) -> Result<(), Error> {
        let Some(sent) = self.reported.sent.take() else {
            return Err(out_of_turn(order, "waiting for the counts of what was sent"));
        };
        let at_fence = order == FENCE;
        if self.breakage.is(Breakage::SkipCounting) || at_fence && self.breakage.is(Breakage::CountAtEnd) {
            return Ok(());
        }
        let page_bytes = self.ingest.placing()?.placer().page_bytes();
        let mut stream = self.ingest.placing()?.in_stream();
        stream.zero += self.reported.zero_in_rounds / page_bytes;
        let mut placed = vec![stream];
        placed.extend(on_channels);
        Ok(compare_counts(&sent, &placed)?)
    }
}
