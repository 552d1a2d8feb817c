//! The pages that a guest has changed since an earlier snapshot, and those that it changes from the next one's moment
//! on.

use std::sync::Arc;

use crate::engine::{ChangedPages, NextBase};
use crate::error::Remedy;
use crate::guest::{DirtySource, GuestMemory, sync_all};
use crate::ram::{ClearShift, DirtyMap, PageSet, RamBlock, RamBlockTable};
use crate::session::Error;
use crate::session::callback::{guarded, named};
use crate::stream::snapshot_note::{BaseNote, SnapshotId, SnapshotNote};
use crate::sys::random_id;
use crate::transport::{HeldFile, SnapshotFile};
use crate::units::{BlockIndex, PageIndex};

/// A snapshot that a later one of the same guest may be taken against: the later one then holds only the pages that
/// have changed since.
///
/// It keeps the dirty sources on, and its file locked against being written to. Dropping it ends both.
#[derive(Debug)]
pub struct SnapshotBase {
    note: BaseNote,
    held: HeldFile,
    log: Log,
    /// Read from the log since then, and in no snapshot.
    changed: PageSet,
    /// The guest's memory.
    table: RamBlockTable,
}

impl SnapshotBase {
    /// Its id, in 32 hexadecimal digits: `ramwire inspect` shows it.
    pub fn id(&self) -> String {
        self.note.id.to_string()
    }

    pub(super) fn check(&self, memory: &dyn GuestMemory) -> Result<(), Error> {
        let shape = |table: &RamBlockTable| {
            let block = |block: &RamBlock| (block.name.clone(), block.used_length, block.host_page);
            (table.page(), table.blocks().iter().map(block).collect::<Vec<_>>())
        };
        if shape(&self.table) == shape(memory.table()) {
            return Ok(());
        }
        Err(Error::Config {
            what: format!("{} is a snapshot of other RAM blocks than the guest has now", self.note.path),
            remedy: Remedy::Advice("take a snapshot without a base after memory was plugged or resized"),
        })
    }
}

/// Dirty sources that are on. Dropping it turns them off.
pub(super) struct Log(Vec<Arc<dyn DirtySource>>);

impl std::fmt::Debug for Log {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|source| source.name())).finish()
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        for source in &self.0 {
            if let Err(error) = guarded("calling DirtySource::stop", || source.stop()) {
                tracing::warn!(%error, "a dirty source could not be turned off");
            }
        }
    }
}

/// The changes as a snapshot sees them while it is taken.
pub(super) struct Changes {
    /// To be turned on.
    sources: Vec<Arc<dyn DirtySource>>,
    log: Option<Log>,
    base: Option<(BaseNote, HeldFile)>,
    pages: ChangedPages,
}

impl Changes {
    /// There is no base; `sources`, if any, report the changes after the moment.
    pub(super) fn tracked(sources: Vec<Arc<dyn DirtySource>>) -> Self {
        Self { sources, log: None, base: None, pages: ChangedPages::of_all() }
    }

    pub(super) fn since(base: SnapshotBase) -> Self {
        let SnapshotBase { note, held, log, changed, .. } = base;
        Self {
            sources: Vec::new(),
            log: Some(log),
            base: Some((note, held)),
            pages: ChangedPages::since(changed),
        }
    }

    /// Only changes are written.
    pub(super) fn has_base(&self) -> bool {
        self.pages.has_base()
    }

    /// A new snapshot's note.
    pub(super) fn note(&self) -> SnapshotNote {
        SnapshotNote { id: SnapshotId(random_id()), base: self.base.as_ref().map(|(note, _)| note.clone()) }
    }

    /// Changes are reported from here on.
    pub(super) fn start(&mut self) -> Result<(), Error> {
        let sources = std::mem::take(&mut self.sources);
        if sources.is_empty() {
            return Ok(());
        }
        // On as soon as one of them is.
        let log = self.log.insert(Log(sources));
        log.0.iter().try_for_each(|source| named("calling DirtySource::start", || source.start()))?;
        self.pages.logged();
        Ok(())
    }

    /// Reads the log. With a base: the pages that have changed since, in whole host pages, without those of earlier answers.
    pub(super) fn find_changed(&mut self, memory: &dyn GuestMemory) -> Result<Option<PageSet>, Error> {
        let Some(log) = &self.log else { return Ok(None) };
        match guarded("reading which pages have changed", || read(log, memory)).and_then(|read| read) {
            Ok(fresh) => Ok(self.pages.read(&fresh)),
            Err(error) => {
                self.pages.lost();
                Err(error)
            }
        }
    }

    /// What a next snapshot may be taken against. `taken`: this one, and where it is.
    pub(super) fn end(
        self,
        taken: Option<(SnapshotId, &SnapshotFile)>,
        memory: &dyn GuestMemory,
    ) -> Option<SnapshotBase> {
        let (log, table) = (self.log?, memory.table().clone());
        match (self.pages.end(taken.is_some()), taken) {
            (NextBase::Same(changed), _) => {
                let (note, held) = self.base?;
                Some(SnapshotBase { note, held, log, changed, table })
            }
            (NextBase::This, Some((id, file))) => {
                let held = match file.hold() {
                    Ok(held) => held,
                    Err(error) => {
                        tracing::warn!(%error, file = ?file.path, "no snapshot can be taken against this one");
                        return None;
                    }
                };
                let note = BaseNote { id, path: file.path.display().to_string(), starts_at: file.starts_at };
                Some(SnapshotBase { note, held, log, changed: PageSet::new(&table), table })
            }
            _ => None,
        }
    }
}

/// Reads the log and arms it again.
fn read(log: &Log, memory: &dyn GuestMemory) -> Result<PageSet, Error> {
    let table = memory.table();
    let mut dirty = DirtyMap::new(table, ClearShift::default());
    sync_all(&log.0, table, &mut dirty)?;
    let mut found = PageSet::new(table);
    for (index, block) in (0..).map(BlockIndex).zip(table.blocks()) {
        dirty.widen(index, block.host_page.bytes() / table.page().bytes());
        while let Some(run) = dirty.take_run(index, PageIndex(0), u64::MAX) {
            if let Some(chunk) = dirty.take_clear_chunk(run) {
                log.0.iter().try_for_each(|source| {
                    named("calling DirtySource::reprotect", || source.reprotect(chunk))
                })?;
            }
            found.add(run);
        }
    }
    Ok(found)
}
