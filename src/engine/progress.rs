//! Whether rounds bring a migration closer to its end.

/// Rounds without progress after which a migration counts as stalled.
const MAX_ROUNDS: u32 = 8;
/// Progress is at least this share of the smallest remainder so far, in percent: less is noise.
const NOTABLE: u64 = 5;

/// Tracks how much remains from round to round.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    least: Option<u64>,
    rounds: u32,
}

impl Progress {
    /// A round begins with `pages` dirty.
    pub fn round(&mut self, pages: u64) {
        let notable = self.least.is_none_or(|least| pages < least - (least * NOTABLE / 100).min(least));
        if notable {
            (self.least, self.rounds) = (Some(pages), 0);
        } else {
            self.rounds += 1;
        }
    }

    /// Rounds since the smallest remainder so far.
    pub fn rounds_without_progress(&self) -> u32 {
        self.rounds
    }

    /// True if there is no sign that the rounds will end.
    pub fn is_stalled(&self) -> bool {
        self.rounds >= MAX_ROUNDS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_never_leaves_less_is_stalled_and_one_that_does_is_not() {
        let mut progress = Progress::default();
        (0..8).for_each(|round| progress.round(1000 + round % 3));
        assert!(!progress.is_stalled());
        progress.round(970);
        assert_eq!((progress.is_stalled(), progress.rounds_without_progress()), (true, 8), "3 % are noise");
        progress.round(900);
        assert_eq!((progress.is_stalled(), progress.rounds_without_progress()), (false, 0));
        let mut shrinking = Progress::default();
        (0..80).for_each(|round| shrinking.round(1 << 20 >> (round / 4)));
        assert!(!shrinking.is_stalled());
    }
}
