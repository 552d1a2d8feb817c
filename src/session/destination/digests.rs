//! The source's digest and ours.

use crate::ram::RamBlockTable;
use crate::session::digest::{Digest, digests_of};
use crate::session::{Breakage, Error};

use super::receive::out_of_turn;

/// The received part of the source's digest, and our own digest.
#[derive(Debug, Default)]
pub(super) struct Digests {
    theirs: Vec<u64>,
    ours: Option<Digest>,
    verified: bool,
}

impl Digests {
    /// Takes a piece of the source's digest; true once it is complete.
    ///
    /// # Errors
    /// It does not continue the received part, or it is longer than `table` requires.
    pub(super) fn take(&mut self, first: u32, values: &[u8], table: &RamBlockTable) -> Result<bool, Error> {
        let due = digests_of(table);
        let count = values.len() / 8;
        if first as usize != self.theirs.len() || self.theirs.len() + count > due {
            return Err(out_of_turn("digests out of order", "comparing"));
        }
        let values = values.chunks_exact(8).filter_map(|v| v.try_into().ok().map(u64::from_be_bytes));
        self.theirs.extend(values);
        Ok(self.theirs.len() == due)
    }

    /// Ours is made.
    pub(super) fn made(&mut self, ours: Digest) {
        self.ours = Some(ours);
    }

    /// Both are there.
    ///
    /// # Errors
    /// They differ.
    pub(super) fn compare(&mut self, table: &RamBlockTable, breakage: Breakage) -> Result<(), Error> {
        let theirs = Digest(std::mem::take(&mut self.theirs));
        let Some(ours) = self.ours.take() else { return Ok(()) };
        let ours = if breakage.is(Breakage::SkipComparing) { theirs.clone() } else { ours };
        ours.compare(&theirs, table)?;
        self.verified = true;
        Ok(())
    }

    /// They were compared and are equal.
    pub(super) fn verified(&self) -> bool {
        self.verified
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::guest::GuestMemory;
    use crate::session::tests::guest;

    fn bytes(values: &[u64]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_be_bytes()).collect()
    }

    #[test]
    fn equal_digests_verify_and_others_do_not() {
        let guest = guest(&[4]);
        let due = digests_of(guest.table());
        let theirs: Vec<u64> = (0..due as u64).collect();
        for (ours, equal) in [(theirs.clone(), true), (vec![9; due], false)] {
            let mut digests = Digests::default();
            assert!(digests.take(0, &bytes(&theirs), guest.table()).unwrap());
            digests.made(Digest(ours));
            assert_eq!(digests.compare(guest.table(), Breakage::None).is_ok(), equal);
            assert_eq!(digests.verified(), equal);
        }
    }

    #[test]
    fn a_digest_comes_in_order_and_no_longer_than_it_is() {
        let guest = guest(&[4]);
        let due = digests_of(guest.table());
        let mut digests = Digests::default();
        assert!(digests.take(1, &bytes(&[7]), guest.table()).is_err(), "its start is missing");
        assert!(digests.take(0, &bytes(&vec![7; due + 1]), guest.table()).is_err(), "more than there are");
        for at in 0..due {
            assert_eq!(digests.take(at as u32, &bytes(&[7]), guest.table()).unwrap(), at + 1 == due);
        }
        assert!(!digests.verified(), "nothing was compared");
    }
}
