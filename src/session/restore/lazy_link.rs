//! The link to a file whose pages are read when they are touched.

use std::sync::{Arc, Mutex};

use crate::engine::{BlockToFill, Fill};
use crate::error::Chain;
use crate::guest::{Placer, ServeError};
use crate::ram::{PageBitmap, PageRun, RamBlock};
use crate::stream::qemu::incoming::AnnouncedBlocks;
use crate::sys::{Lock as _, MissingFaults, Stop};
use crate::transport::{
    ByteSource, ChannelError, DestinationAbilities, DestinationLink, MappedDestination, MoveError, PageSupply,
};
use crate::units::{BlockIndex, PageIndex};

use super::lazy_pages::LazyPages;
use super::{RestoreSettings, working_set};
use crate::session::pager::{Filling, GuestPages, holes};

/// The stream of a file; faults are served from the moment on that memory exists.
pub(super) struct LazyLink {
    file: MappedDestination,
    faults: Arc<MissingFaults>,
    supply: Option<Arc<dyn PageSupply>>,
    settings: RestoreSettings,
    /// Where the pages are passed to when the session is over.
    begun: Arc<Mutex<Option<LazyPages>>>,
}

impl LazyLink {
    pub(super) fn new(
        file: MappedDestination,
        faults: MissingFaults,
        supply: Option<Arc<dyn PageSupply>>,
        settings: RestoreSettings,
        begun: Arc<Mutex<Option<LazyPages>>>,
    ) -> Self {
        Self { file, faults: Arc::new(faults), supply, settings, begun }
    }

    fn failed(&self, doing: &'static str, why: String) -> MoveError {
        ChannelError::Io { peer: self.file.name(), doing, source: std::io::Error::other(why) }.into()
    }
}

impl crate::transport::Sealed for LazyLink {}

impl DestinationLink for LazyLink {
    fn abilities(&self) -> DestinationAbilities {
        let mut abilities = self.file.abilities();
        abilities.on_demand = true;
        abilities
    }

    fn stream(&mut self) -> &mut dyn ByteSource {
        DestinationLink::stream(&mut self.file)
    }

    /// The memory exists and is empty: from here on a thread that touches it waits for its pages.
    fn announce(&mut self, placer: &Arc<Placer>, _blocks: &AnnouncedBlocks) -> Result<(), MoveError> {
        let pages = self.file.pages(placer)?;
        let table = placer.memory().table();
        let to_fill = |(index, block): (u32, &RamBlock)| {
            let mut present = PageBitmap::new(table.pages_of(block));
            if let Some(there) = pages.present(BlockIndex(index)) {
                present.merge_words(0, there.words());
            }
            BlockToFill { present, host_page: block.host_page }
        };
        let mut fill = Fill::new(table.page(), (0..).zip(table.blocks()).map(to_fill).collect());
        if let Some(path) = &self.settings.working_set {
            fill.read_first(working_set::read(path, table));
        }
        let untold = Box::new(|_| {});
        placer.serve_missing(Arc::clone(&self.faults), untold).map_err(|error| match error {
            ServeError::Guest(error) => MoveError::Guest(error),
            error => self.failed("serving faults of missing pages", Chain(&error).to_string()),
        })?;
        mark_holes(placer, &fill);
        let supply = self.supply.take().unwrap_or_else(|| Arc::new(pages));
        let memory = GuestPages::new(Arc::clone(placer), Arc::clone(&self.faults));
        let filling = Filling::new(Box::new(memory), supply, table.page(), fill);
        let record = self.settings.working_set.clone().map(|path| (path, Arc::clone(placer.memory())));
        let started = LazyPages::start(filling, &self.settings, record);
        let started = started.map_err(|error| self.failed("starting a thread", Chain(&error).to_string()))?;
        *self.begun.locked() = Some(started);
        Ok(())
    }

    /// There is no time limit for pages.
    fn barrier(&mut self, _stop: &Stop) -> Result<(), MoveError> {
        Ok(())
    }

    fn revoke(&mut self) {}

    fn close(&mut self, _stop: &Stop) -> Result<(), ChannelError> {
        Ok(())
    }
}

/// Pages that are not in the file are zero: they count as received.
fn mark_holes(placer: &Placer, fill: &Fill) {
    let table = placer.memory().table();
    for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
        let Some(missing) = fill.missing(index).filter(|_| !block.flags.ignored) else { continue };
        holes(missing, table.pages_of(block), |first, pages| {
            placer.written(PageRun { block: index, first: PageIndex(first), pages });
            placer.count_zero(pages);
        });
    }
}
