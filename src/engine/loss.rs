//! Whether all sent pages were placed.
//!
//! Both ends count each page each time it is sent, separately for the stream and for each page channel. The destination
//! compares before READY: a migration in which a sent page did not arrive never succeeds.

use crate::observe::PageCounts;

/// A difference between the sent and the placed pages, in either direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{} lost pages: the source sent {}, the destination placed {}; the guest runs on at the source; start the \
     migration again",
    way(*channel), counted(sent), counted(placed)
)]
pub struct LostPages {
    /// The page channel; `None` for the stream.
    pub channel: Option<u8>,
    /// What the source counted.
    pub sent: PageCounts,
    /// What the destination counted.
    pub placed: PageCounts,
}

fn way(channel: Option<u8>) -> String {
    channel.map_or_else(|| "the stream".into(), |channel| format!("page channel {channel}"))
}

fn counted(count: &PageCounts) -> String {
    let PageCounts { normal, zero, delta } = count;
    let deltas = if *delta > 0 { format!(" and {delta} deltas") } else { String::new() };
    format!("{normal} whole and {zero} zero pages{deltas}")
}

/// Compares the counts of both ends: first those of the stream, then those of each page channel by its id. An end that
/// has fewer channels than the other has moved no page on the missing ones.
///
/// # Errors
/// [`LostPages`] of the first channel that differs.
pub fn compare_counts(sent: &[PageCounts], placed: &[PageCounts]) -> Result<(), LostPages> {
    for at in 0..sent.len().max(placed.len()) {
        let of = |counts: &[PageCounts]| counts.get(at).copied().unwrap_or_default();
        let (sent, placed) = (of(sent), of(placed));
        if sent != placed {
            let channel = at.checked_sub(1).map(|channel| channel as u8);
            return Err(LostPages { channel, sent, placed });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn count(normal: u64, zero: u64) -> PageCounts {
        PageCounts { normal, zero, delta: 0 }
    }

    #[test]
    fn a_page_that_is_missing_anywhere_is_found() {
        let sent = [count(3, 4), count(5, 0), count(5, 6)];
        assert_eq!(compare_counts(&sent, &sent), Ok(()));
        assert_eq!(compare_counts(&[], &[]), Ok(()));
        for (at, less) in [(0, count(2, 4)), (0, count(3, 3)), (1, count(4, 0)), (2, count(5, 7))] {
            let mut placed = sent;
            placed[at] = less;
            let lost =
                LostPages { channel: at.checked_sub(1).map(|at| at as u8), sent: sent[at], placed: less };
            assert_eq!(compare_counts(&sent, &placed), Err(lost));
        }
        assert_eq!(compare_counts(&sent, &sent[..2]).unwrap_err().channel, Some(1));
        assert_eq!(compare_counts(&sent[..1], &sent[..2]).unwrap_err().channel, Some(0));
        let moved = [count(4, 4), count(4, 0)];
        assert!(compare_counts(&sent[..2], &moved).is_err(), "the same sum by other ways");
    }

    #[test]
    fn what_differs_is_named() {
        let lost = compare_counts(&[count(0, 2)], &[count(0, 1)]).unwrap_err();
        let said = lost.to_string();
        assert!(said.contains("the stream lost pages: the source sent 0 whole and 2 zero pages"), "{said}");
    }
}
