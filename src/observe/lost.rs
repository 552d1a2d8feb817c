//! Connections that were lost while a migration went on.

use serde::Serialize;

/// One connection that was lost, and what followed.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LostConnection {
    /// When, in milliseconds since the start.
    pub at_ms: f64,
    /// The round that was being sent, or the last one; 0 before the first.
    pub round: u32,
    /// Why it was lost.
    pub why: String,
    /// COMMIT had been sent.
    pub committed: bool,
    /// Milliseconds until the ends went on over another connection, later losses before that included; `None`: they have not.
    pub took_ms: Option<f64>,
    /// Pages that had been sent and that the destination did not report to have: they are sent again, unless the guest frees
    /// them.
    pub pages_again: u64,
    /// Their bytes.
    pub bytes_again: u64,
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[non_exhaustive]
pub struct LostConnections {
    /// How many were lost.
    pub count: u64,
    /// Pages that were to be sent again.
    pub pages_again: u64,
    /// Their bytes.
    pub bytes_again: u64,
    /// The last [`MAX`](Self::MAX).
    pub last: Vec<LostConnection>,
}

impl LostConnections {
    /// Connections that are kept.
    pub const MAX: usize = 16;

    /// One was lost.
    pub(crate) fn lose(&mut self, lost: LostConnection) {
        self.count += 1;
        if self.last.len() >= Self::MAX {
            self.last.remove(0);
        }
        self.last.push(lost);
    }

    /// The ends go on, at this time. So many pages of `page_size` are sent again.
    pub(crate) fn replace(&mut self, now_ms: f64, pages: u64, page_size: u64) {
        let bytes = pages * page_size;
        self.pages_again += pages;
        self.bytes_again += bytes;
        for lost in self.last.iter_mut().filter(|lost| lost.took_ms.is_none()) {
            lost.took_ms = Some(now_ms - lost.at_ms);
        }
        if let Some(lost) = self.last.last_mut() {
            (lost.pages_again, lost.bytes_again) = (pages, bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn losses_are_counted_beyond_those_that_are_kept() {
        let mut lost = LostConnections::default();
        for round in 0..40 {
            lost.lose(LostConnection { round, at_ms: 10.0, ..LostConnection::default() });
        }
        lost.replace(25.0, 3, 4096);
        assert_eq!((lost.count, lost.last.len(), lost.pages_again, lost.bytes_again), (40, 16, 3, 12288));
        assert_eq!((lost.last[0].round, lost.last[0].took_ms, lost.last[0].pages_again), (24, Some(15.0), 0));
        assert_eq!((lost.last[15].took_ms, lost.last[15].bytes_again), (Some(15.0), 12288));
        lost.replace(90.0, 1, 4096);
        assert_eq!(lost.last[0].took_ms, Some(15.0), "once");
    }
}
