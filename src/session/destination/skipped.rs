//! Pages whose last state a ramwire source has not sent.

use std::sync::Arc;

use crate::error::Chain;
use crate::ram::PageSet;
use crate::stream::native::{Range, Unsent};
use crate::units::{BlockIndex, PageIndex};

use super::DestinationSession;
use super::receive::out_of_turn;
use crate::session::Error;

impl DestinationSession {
    /// The digest leaves them out; for unplugged pages, memory that an earlier state occupied is freed.
    pub(super) fn not_sent(&mut self, announced: u32, why: Unsent, ranges: &[u8]) -> Result<(), Error> {
        let registered = self.wire.link.abilities().has_rounds;
        let placer = Arc::clone(self.ingest.placing()?.placer());
        let table = placer.memory().table();
        if self.reported.unsent.is_empty() {
            self.reported.unsent = PageSet::new(table);
        }
        for Range { first, pages } in Range::decode_all(ranges) {
            let refused =
                |what: String| out_of_turn(&format!("UNSENT, {what}"), "waiting for the device state");
            let found = placer.admit_pages(BlockIndex(announced), PageIndex(first), pages);
            let found = found.map_err(|error| refused(Chain(&error).to_string()))?;
            let landing = found.ok_or_else(|| refused(format!("{pages} pages from page {first} on")))?;
            let run = landing.run(table.page());
            self.reported.unsent.add(run);
            // An observer has copied the received pages, and uses its copy.
            if why == Unsent::Free || placer.observer().is_some() {
                continue;
            }
            if !registered {
                placer.memory().discard(landing)?;
            } else if placer.may_hold(landing) {
                placer.target(landing)?.fill_zero();
            }
        }
        Ok(())
    }
}
