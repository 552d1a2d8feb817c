//! Estimates how many bytes dirty pages will take on the wire if they are sent as differences.

/// Bytes and pages of the last two rounds after the first.
///
/// A page that is dirty again mostly changes as it did before, so its difference is about as long. The estimate needs
/// two rounds, each with at least half as many pages as are dirty now, and uses the more expensive one. So a round in
/// which pages were sent for the first time, as whole pages, still counts in the next.
#[derive(Clone, Copy, Debug, Default)]
pub struct PageCost {
    rounds: [(u64, u64); 2],
}

/// Margin in percent: rounds differ.
const MARGIN: u64 = 25;

impl PageCost {
    /// A round of `pages` took `bytes`.
    pub fn round(&mut self, pages: u64, bytes: u64) {
        self.rounds = [self.rounds[1], (pages, bytes)];
    }

    /// Bytes that `pages` dirty pages will take, at most `whole` for each.
    pub fn bytes(&self, pages: u64, whole: u64) -> u64 {
        let most = pages.saturating_mul(whole);
        let cost = |(of, bytes): (u64, u64)| {
            let tells = of > 0 && of >= pages / 2;
            tells.then(|| {
                u128::from(bytes) * u128::from(pages) * u128::from(100 + MARGIN) / 100 / u128::from(of)
            })
        };
        let [Some(one), Some(other)] = self.rounds.map(cost) else { return most };
        u64::try_from(one.max(other)).map_or(most, |bytes| bytes.min(most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dearer_of_two_rounds_counts_and_one_alone_tells_nothing() {
        let mut cost = PageCost::default();
        assert_eq!(cost.bytes(1000, 4096), 4_096_000);
        cost.round(1000, 80_000);
        assert_eq!(cost.bytes(1000, 4096), 4_096_000, "one round may be an accident");
        cost.round(1000, 160_000);
        assert_eq!(cost.bytes(1000, 4096), 200_000, "160 bytes a page and a quarter");
        cost.round(1000, 4_105_000);
        assert_eq!(cost.bytes(1000, 4096), 4_096_000, "pages that came whole count as whole");
        cost.round(900, 90_000);
        assert_eq!(cost.bytes(1000, 4096), 4_096_000, "and are not forgotten at once");
        cost.round(900, 90_000);
        assert_eq!(cost.bytes(1000, 4096), 125_000);
    }

    #[test]
    fn few_pages_tell_nothing_of_many() {
        let mut cost = PageCost::default();
        (0..2).for_each(|_| cost.round(100, 1000));
        assert_eq!((cost.bytes(200, 4096), cost.bytes(202, 4096)), (2500, 202 * 4096));
        (0..2).for_each(|_| cost.round(0, 1000));
        assert_eq!((cost.bytes(0, 4096), cost.bytes(1, 4096)), (0, 4096));
        (0..2).for_each(|_| cost.round(1, u64::MAX));
        assert_eq!(cost.bytes(2, 4096), 8192);
    }
}
