//! Which pages of a guest were touched, and in what order, when it was restored: stored next to its file.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::ram::{PageRun, PageSet, RamBlockTable};
use crate::units::PageIndex;

/// Maximum number of bytes of such a file.
const MAX_BYTES: u64 = 64 << 20;

/// Version of the format below.
const FORMAT: u32 = 1;

/// Content of the file.
#[derive(Debug, Serialize, Deserialize)]
struct WorkingSet {
    format: u32,
    /// Bytes of a page.
    page: u64,
    /// Block, first page, pages; in the order in which they were touched.
    runs: Vec<(String, u64, u64)>,
}

/// The pages that were touched the last time; empty if there is no such file. An invalid file is ignored with a
/// warning: it only makes a restore faster.
pub(super) fn read(path: &Path, table: &RamBlockTable) -> Vec<PageRun> {
    match decoded(path, table) {
        Ok(runs) => runs,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => {
            tracing::warn!(%error, path = %path.display(), "the working set is not used");
            Vec::new()
        }
    }
}

fn decoded(path: &Path, table: &RamBlockTable) -> io::Result<Vec<PageRun>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(io::Error::other(format!("it is longer than {MAX_BYTES} bytes")));
    }
    let set: WorkingSet = serde_json::from_slice(&text)?;
    if (set.format, set.page) != (FORMAT, table.page().bytes()) {
        let why = format!("it is of format {} for pages of {} bytes", set.format, set.page);
        return Err(io::Error::other(why));
    }
    let mut runs = Vec::with_capacity(set.runs.len());
    for (name, first, pages) in set.runs {
        let block = table.find(&name).map_err(io::Error::other)?;
        let run = PageRun { block, first: PageIndex(first), pages };
        if pages == 0 || first.checked_add(pages).is_none() {
            return Err(io::Error::other(format!("{pages} pages at {first} of block {name} are none")));
        }
        table.admit_run(run).map_err(io::Error::other)?;
        runs.push(run);
    }
    Ok(runs)
}

/// Replaces the file atomically. Repeated pages are left out.
pub(super) fn write(path: &Path, table: &RamBlockTable, touched: &[PageRun]) -> io::Result<()> {
    let mut seen = PageSet::new(table);
    let fresh = touched.iter().filter(|run| seen.add(**run) > 0);
    let named = |run: &PageRun| {
        let name = table.get(run.block).map_or_else(String::new, |block| block.name.to_string());
        (name, run.first.0, run.pages)
    };
    let runs = fresh.map(named).collect();
    let set = WorkingSet { format: FORMAT, page: table.page().bytes(), runs };
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let mut file = File::create(&new)?;
    file.write_all(&serde_json::to_vec(&set)?)?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::ram::{BlockName, RamBlock};
    use crate::units::{BlockIndex, PageSize};

    fn run(block: u32, first: u64, pages: u64) -> PageRun {
        PageRun { block: BlockIndex(block), first: PageIndex(first), pages }
    }

    #[test]
    fn what_was_touched_is_found_again_in_its_order_and_what_makes_no_sense_is_left_out() {
        let block = |name, pages: u64| RamBlock::new(BlockName::new(name).unwrap(), pages * 4096);
        let table = RamBlockTable::new(PageSize::SIZE_4K, vec![block("a", 100), block("b", 5)]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("set");
        assert_eq!(read(&path, &table), []);
        write(&path, &table, &[run(1, 3, 1), run(0, 50, 20), run(0, 51, 2), run(0, 7, 1)]).unwrap();
        assert_eq!(read(&path, &table), [run(1, 3, 1), run(0, 50, 20), run(0, 7, 1)]);
        let text = fs::read_to_string(&path).unwrap();
        for (from, to) in [
            ("[\"b\",3,1]", "[\"b\",5,1]"),
            ("[\"b\",3,1]", "[\"c\",3,1]"),
            ("[\"b\",3,1]", "[\"b\",18446744073709551615,2]"),
            ("[\"b\",3,1]", "[\"b\",3,0]"),
            ("[\"b\",3,1]", "[\"b\",3]"),
            ("\"format\":1", "\"format\":2"),
            ("\"page\":4096", "\"page\":8192"),
        ] {
            assert!(text.contains(from), "{text}");
            fs::write(&path, text.replace(from, to)).unwrap();
            assert!(decoded(&path, &table).is_err(), "{to}");
            assert_eq!(read(&path, &table), []);
        }
    }
}
