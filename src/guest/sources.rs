//! Several dirty sources as one: synced together, and chosen by probing.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::{DirtyError, DirtySource};
use crate::observe::named;
use crate::ram::{DirtyMap, RamBlockTable};
use crate::units::BlockIndex;

/// One sync: every source is synced for every migrated block, and all results are ORed into `dirty`. Returns how many
/// pages became dirty that were clean before.
///
/// # Errors
/// The error of the first source that fails; pages reported before stay in `dirty`.
pub fn sync_all(
    sources: &[Arc<dyn DirtySource>],
    table: &RamBlockTable,
    dirty: &mut DirtyMap,
) -> Result<u64, DirtyError> {
    let begin =
        |source: &Arc<dyn DirtySource>| named("calling DirtySource::begin_sync", || source.begin_sync());
    sources.iter().try_for_each(begin)?;
    let mut fresh = 0;
    for (index, block) in table.blocks().iter().enumerate() {
        if !block.flags.ignored {
            let index = BlockIndex(index as u32);
            let sync = |map: &mut _| {
                let mut each = sources.iter();
                each.try_for_each(|s| named("calling DirtySource::sync_into", || s.sync_into(index, map)))
            };
            fresh += dirty.sync_block(index, sync)?;
        }
    }
    Ok(fresh)
}

/// The remedy if a file of /proc could not be opened: `missing`, unless the kernel's error names a limit.
pub(super) fn no_proc(error: &io::Error, missing: &'static str) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EMFILE) => "raise the limit of open files (RLIMIT_NOFILE)",
        Some(libc::ENFILE) => "too many files are open on this host; raise fs.file-max",
        _ => missing,
    }
}

/// The dirty source that passed its probe, and why those before it failed.
pub struct Choice {
    /// The first source that works here.
    pub source: Arc<dyn DirtySource>,
    /// The sources tried before it, with their reasons.
    pub refused: Vec<DirtyError>,
}

impl fmt::Debug for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Choice").field("source", &self.source.name()).field("refused", &self.refused).finish()
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.source.name())?;
        self.refused.iter().try_for_each(|refused| write!(f, "; {refused}"))
    }
}

/// No candidate works here.
#[derive(Debug, thiserror::Error)]
#[error("no dirty source works for this guest{}", .refused.iter().map(|r| format!("; {r}")).collect::<String>())]
pub struct NoSource {
    /// Every candidate's reason, in order.
    pub refused: Vec<DirtyError>,
}

/// Probes `candidates`, alternatives for the same writers, in order and returns the first that works.
///
/// # Errors
/// [`NoSource`] with every reason.
pub fn choose(candidates: &[Arc<dyn DirtySource>]) -> Result<Choice, NoSource> {
    let mut refused = Vec::new();
    for source in candidates {
        match source.probe() {
            Ok(()) => return Ok(Choice { source: source.clone(), refused }),
            Err(error) => refused.push(error),
        }
    }
    Err(NoSource { refused })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, ClearShift, PageBitmap, RamBlock};
    use crate::units::PageSize;

    /// Reports one page of every block, or fails.
    struct Fixed(&'static str, Option<u64>);

    impl DirtySource for Fixed {
        fn name(&self) -> &'static str {
            self.0
        }
        fn probe(&self) -> Result<(), DirtyError> {
            let reason = || "it was told so".to_owned();
            self.1.map(drop).ok_or_else(|| DirtyError::Unsupported { source_name: self.0, reason: reason() })
        }
        fn start(&self) -> Result<(), DirtyError> {
            Ok(())
        }
        fn sync_into(&self, _block: BlockIndex, into: &mut PageBitmap) -> Result<(), DirtyError> {
            self.probe()?;
            if let Some(page) = self.1 {
                into.set_range(page..page + 1);
            }
            Ok(())
        }
        fn stop(&self) -> Result<(), DirtyError> {
            Ok(())
        }
    }

    fn sources(list: &[(&'static str, Option<u64>)]) -> Vec<Arc<dyn DirtySource>> {
        list.iter().map(|(name, page)| Arc::new(Fixed(name, *page)) as Arc<dyn DirtySource>).collect()
    }

    #[test]
    fn the_first_source_that_works_is_taken_and_the_reasons_are_kept() {
        let choice = choose(&sources(&[("a", None), ("b", Some(0)), ("c", Some(0))])).unwrap();
        assert_eq!(choice.to_string(), "b; a can't track this guest: it was told so");
        let error = choose(&sources(&[("a", None), ("b", None)])).unwrap_err();
        assert_eq!(error.refused.len(), 2);
        assert!(error.to_string().ends_with("; b can't track this guest: it was told so"), "{error}");
    }

    #[test]
    fn all_sources_are_ored_and_ignored_blocks_left_out() {
        let block = |name| RamBlock::new(BlockName::new(name).unwrap(), 8 * 4096);
        let mut blocks = vec![block("a"), block("b"), block("c")];
        blocks[1].flags.ignored = true;
        let table = RamBlockTable::new(PageSize::SIZE_4K, blocks).unwrap();
        let mut dirty = DirtyMap::new(&table, ClearShift::default());
        let two = sources(&[("x", Some(1)), ("y", Some(3))]);
        assert_eq!(sync_all(&two, &table, &mut dirty).unwrap(), 4);
        assert_eq!(sync_all(&two, &table, &mut dirty).unwrap(), 0);
        let counts = [0, 1, 2].map(|index| dirty.block(BlockIndex(index)).unwrap().count());
        assert_eq!(counts, [2, 0, 2]);
        // Pages that the first source reported before the second failed are not lost.
        let failing = sources(&[("x", Some(5)), ("y", None)]);
        assert!(sync_all(&failing, &table, &mut dirty).is_err());
        assert_eq!(dirty.block(BlockIndex(0)).unwrap().count(), 3);
    }

    #[test]
    fn a_limit_of_open_files_is_not_told_as_a_missing_proc() {
        let told = |errno| no_proc(&io::Error::from_raw_os_error(errno), "mount it");
        assert!(told(libc::EMFILE).contains("limit of open files"));
        assert!(told(libc::ENFILE).contains("fs.file-max"));
        assert_eq!(told(libc::ENOENT), "mount it");
    }
}
