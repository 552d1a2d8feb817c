//! What the source has told of itself and what it has sent: page channels are compared before the first page, pages
//! before READY.

use crate::engine::{agree_on_channels, compare_counts};
use crate::error::Remedy;
use crate::observe::PageCounts;
use crate::ram::PageSet;
use crate::session::{Breakage, Error};
use crate::stream::native::channels_of_ping;
use crate::stream::page_counts;
use crate::stream::qemu::file::{Configuration, IGNORE_SHARED};
use crate::stream::qemu::packet_numbers::MissingPackets;

use super::DestinationSession;
use super::digests::Digests;
use super::receive::out_of_turn;

/// What the source has told of itself and of the pages it sent.
#[derive(Debug, Default)]
pub(super) struct SourceTold {
    /// It reads answers.
    pub(super) return_path: bool,
    pub(super) configuration: Option<Configuration>,
    /// A ramwire sent the greeting, so that it understands REFUSED.
    pub(super) greeted: bool,
    pub(super) migration_id: Option<[u8; 16]>,
    /// Its page channels.
    channels: u8,
    pub(super) vmm_configuration: Vec<u8>,
    /// Pages it has sent.
    sent: Option<Vec<PageCounts>>,
    /// Bytes that came as zero in rounds by another link than the stream.
    pub(super) zero_in_rounds: u64,
    /// Pages that it has not sent in their last state.
    pub(super) unsent: PageSet,
    pub(super) digests: Digests,
}

impl SourceTold {
    /// A PING may carry the number of page channels.
    pub(super) fn ping(&mut self, value: u32) {
        self.channels = channels_of_ping(value).unwrap_or(self.channels);
    }
}

/// The source has a page channel that is not read here.
pub(super) fn more_channels_there(MissingPackets { sent, came }: MissingPackets) -> Error {
    Error::Config {
        what: format!(
            "the source has more page channels than this end: of {sent} packets that it has sent on them {came} have come"
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
    /// A connection that nobody reads loses its pages, and one that does not exist is waited for in vain.
    pub(super) fn agree_on_channels(&mut self) -> Result<(), Error> {
        let ours = self.link.abilities().page_channels;
        Ok(agree_on_channels(self.told.channels, ours)?)
    }

    /// RAM has ended, and not one whole page of it came in the stream, and some pages not at all: they went on page channels
    /// that nobody reads. Of a QEMU whose barriers are no records (7.2) nothing else tells that it has some. What a guest
    /// need not send, free pages say, is never all that holds anything.
    pub(super) fn refuse_unread_channels(&mut self) -> Result<(), Error> {
        // Only beside a socket are there connections that nobody reads.
        let alone = self.link.stream().descriptor().is_none();
        let able = self.link.abilities();
        let beside = alone || able.page_channels > 0 || able.has_rounds;
        let some_stay =
            self.told.configuration.as_ref().is_some_and(|configuration| configuration.has(IGNORE_SHARED));
        if beside || some_stay || self.advised.is_some() || self.engine.is_native() {
            return Ok(());
        }
        let placing = self.placing()?;
        let PageCounts { normal, delta, zero } = placing.in_stream();
        // A source with page channels that nobody reads sends its zero pages in the stream; one that sends no page at all
        // has none to lose.
        if zero == 0 || normal > 0 || delta > 0 || placing.placer().never_came() == 0 {
            return Ok(());
        }
        Err(no_channels_here())
    }

    /// SENT: kept until everything has come.
    pub(super) fn source_sent(&mut self, counts: &[u8]) -> Result<(), Error> {
        if !self.sections.ram_ended() || !self.engine.is_native() {
            return Err(out_of_turn("SENT", "waiting for the last page of a ramwire"));
        }
        self.told.sent = Some(page_counts::decode(counts));
        Ok(())
    }

    /// Everything has come: is it what was sent?
    pub(super) fn compare_counts(&mut self) -> Result<(), Error> {
        let Some(sent) = self.told.sent.take() else {
            return Err(out_of_turn("STATE_SENT", "waiting for the counts of what was sent"));
        };
        if self.breakage.is(Breakage::SkipCounting) {
            return Ok(());
        }
        let page_bytes = self.placing()?.placer().page_bytes();
        let mut stream = self.placing()?.in_stream();
        stream.zero += self.told.zero_in_rounds / page_bytes;
        let mut placed = vec![stream];
        placed.extend(self.link.placed_pages());
        Ok(compare_counts(&sent, &placed)?)
    }
}
