//! How one thread gets bytes into guest memory for the least work of the kernel.

use std::io::IoSlice;

use super::Placer;
use super::missing::HostPages;
use crate::guest::GuestError;
use crate::ram::Landing;
use crate::sys::{HostSpan, MinorFaultMonitor, populate};

/// Parts that one `pwrite` takes.
const PARTS_A_WRITE: usize = 64;

/// The placement policy of one thread.
///
/// Memory that is mapped is stored to. Where the thread's last stores met page faults, memory is not mapped: then bytes go
/// by `pwrite` to the backing file, which costs half of a first store, or else a run is populated by one call before it is
/// stored to.
#[derive(Debug, Default)]
pub struct PageWriter {
    faults: MinorFaultMonitor,
    unmapped: bool,
    host_pages: HostPages,
}

impl PageWriter {
    #[cfg(test)]
    pub(super) fn assume_unmapped(&mut self, unmapped: bool) {
        self.unmapped = unmapped;
    }

    /// Finds out whether the bytes written since the last call met page faults. To be called once for each batch of bytes.
    pub fn check_faults(&mut self) {
        self.unmapped = self.faults.has_many_faults();
    }

    /// Prepares `landings` for bytes that the kernel receives straight into them. True if they had better be received into
    /// a buffer and [written](Self::write) from there, since a backing file takes them for less.
    pub fn prepare(&self, placer: &Placer, landings: &[Landing]) -> bool {
        if !self.unmapped {
            return false;
        }
        if landings.first().is_some_and(|first| placer.region(*first).is_some()) {
            return true;
        }
        let new = landings.iter().filter(|landing| !placer.is_received(**landing));
        new.filter_map(|landing| placer.target(*landing).ok()).for_each(populated);
        false
    }

    /// Places whole target pages, one after the other from the first of `landing` on, and commits them. Where missing pages
    /// are served, a host page is placed and committed when its last target page is here.
    ///
    /// # Errors
    /// As [`write`](Self::write); too many host pages that were begun.
    pub fn place<'a>(
        &mut self,
        placer: &Placer,
        landing: Landing,
        pages: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), GuestError> {
        if placer.serves_missing() {
            return self.host_pages.take_run(placer, landing, pages);
        }
        self.write(placer, landing, 0, pages)?;
        placer.commit(landing);
        Ok(())
    }

    /// As [`place`](Self::place), a page of zeros.
    ///
    /// # Errors
    /// As [`place`](Self::place).
    pub fn place_zero(&mut self, placer: &Placer, landing: Landing) -> Result<(), GuestError> {
        if placer.serves_missing() {
            self.host_pages.take(placer, landing, None)
        } else {
            placer.zero(landing)
        }
    }

    /// The connection that delivered pages is gone: partially received host pages will be sent again.
    pub fn forget_parts(&mut self) {
        self.host_pages.drop_parts();
    }

    /// Writes `parts`, whole target pages each, one after the other, from `skip` bytes into `landing` on. They are not marked received yet: that is
    /// [`Placer::commit`]'s.
    ///
    /// # Errors
    /// [`GuestError`]: no memory, no room in the backing file's file system, or a landing of another table.
    pub fn write<'a>(
        &mut self,
        placer: &Placer,
        landing: Landing,
        skip: u64,
        parts: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> Result<(), GuestError> {
        let mut at = skip;
        for part in parts.clone() {
            placer.print(landing, at, part);
            at += part.len() as u64;
        }
        // Waiting for the turn would cost more than populating.
        if self.unmapped
            && placer.region(landing).is_some()
            && let Some(_turn) = placer.try_file_turn()
            && self.write_by_file(placer, landing, skip, parts.clone())?
        {
            return Ok(());
        }
        let span = placer.target(landing)?;
        let len = parts.clone().map(<[u8]>::len).sum();
        debug_assert!(span.part(skip as usize, len).is_some(), "parts longer than what was admitted");
        if let Some(span) = span.part(skip as usize, len) {
            if self.unmapped {
                populated(span);
            }
            span.stream_pages(parts);
        }
        Ok(())
    }

    fn write_by_file<'a>(
        &mut self,
        placer: &Placer,
        landing: Landing,
        skip: u64,
        mut bytes: impl Iterator<Item = &'a [u8]>,
    ) -> Result<bool, GuestError> {
        let mut at = skip;
        loop {
            let mut parts = [IoSlice::new(&[]); PARTS_A_WRITE];
            let mut used = 0;
            for (part, bytes) in parts.iter_mut().zip(bytes.by_ref()) {
                *part = IoSlice::new(bytes);
                used += 1;
            }
            if used == 0 {
                self.faults.by_file();
                return Ok(true);
            }
            if !placer.write_by_file(landing, at, &parts[..used])? {
                return Ok(false);
            }
            at += parts[..used].iter().map(|part| part.len() as u64).sum::<u64>();
        }
    }
}

/// A kernel that can't populate, or has no memory left, reports that again at the fault.
fn populated(span: HostSpan<'_>) {
    let _ = populate(span);
}
