//! Numbers of a seed.

use crate::transport::Random;

/// Draws from a seed.
#[derive(Clone, Debug)]
pub(in crate::session::sim) struct Rng(Random);

impl Rng {
    pub(in crate::session::sim) fn new(seed: u64) -> Self {
        let mut rng = Self(Random(seed));
        rng.next();
        rng
    }

    pub(in crate::session::sim) fn next(&mut self) -> u64 {
        self.0.draw()
    }

    /// A number below `limit`.
    pub(in crate::session::sim) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// A number below one of `limits`.
    pub(in crate::session::sim) fn below_one_of(&mut self, limits: &[u64]) -> u64 {
        let limit = self.pick(limits);
        self.below(limit)
    }

    /// True once in `n`.
    pub(in crate::session::sim) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(in crate::session::sim) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
