//! Dirty pages as they are read for the connection.

use std::sync::Arc;

use crate::guest::{DirtySource, GuestMemory};
use crate::page::{ZeroDetection, classify};
use crate::ram::{DirtyMap, PageBatch, PageRun};

use super::Error;
use super::callback::named;

/// Order 1: the bits of `run` are cleared, now the logs are armed again, only then are the bytes read.
pub(super) fn read(
    (memory, sources): (&dyn GuestMemory, &[Arc<dyn DirtySource>]),
    dirty: &mut DirtyMap,
    run: PageRun,
    detection: ZeroDetection,
    batch: &mut PageBatch,
) -> Result<(), Error> {
    reprotect(sources, dirty.take_clear_chunk(run))?;
    Ok(classify(memory, run, detection, batch)?)
}

/// Arms the logs of these pages again, if there are some.
pub(super) fn reprotect(sources: &[Arc<dyn DirtySource>], chunk: Option<PageRun>) -> Result<(), Error> {
    let Some(chunk) = chunk else { return Ok(()) };
    sources
        .iter()
        .try_for_each(|source| named("calling DirtySource::reprotect", || source.reprotect(chunk)))?;
    Ok(())
}
