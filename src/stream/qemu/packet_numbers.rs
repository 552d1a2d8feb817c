//! Detection of missing packets from the packet numbers.
//!
//! A source numbers the packets of all its page channels in one sequence, from 0. At a barrier it has sent all earlier
//! packets on every channel. So if fewer packets have arrived than the highest number implies, this end does not read
//! one of the channels: that channel's SYNC packets have numbers too. One barrier may not show this, if the missing
//! channel has the highest numbers; the next barrier does.
//!
//! An old QEMU (7.2) may put a SYNC on a packet with pages that has its number already. Then the packet gets the number
//! of the SYNC, its own number is never sent, and an empty packet without SYNC follows that repeats the number.

/// Numbers of the packets that have arrived.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PacketNumbers {
    /// Numbers that these packets have used up.
    used: u64,
    /// The highest number, and one.
    end: u64,
}

/// Packets that were sent but have not arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MissingPackets {
    /// Number of packets that the highest number implies.
    pub sent: u64,
    /// The packets that have arrived.
    pub arrived: u64,
}

impl PacketNumbers {
    /// A packet has arrived.
    pub fn took(&mut self, number: u64, sync: bool, has_pages: bool) {
        self.used += match (sync, has_pages) {
            (true, true) => 2,
            (true, false) | (false, true) => 1,
            (false, false) => 0,
        };
        self.end = self.end.max(number.saturating_add(1));
    }

    /// Those of another channel, too.
    pub fn add(&mut self, other: Self) {
        self.used += other.used;
        self.end = self.end.max(other.end);
    }

    /// To be called when all channels are at a barrier.
    ///
    /// # Errors
    /// [`MissingPackets`]: this end does not read one of the channels. A source whose numbers do not count packets is
    /// trusted.
    pub fn check(&self) -> Result<(), MissingPackets> {
        if self.used >= self.end {
            Ok(())
        } else {
            Err(MissingPackets { sent: self.end, arrived: self.used })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(packets: &[(u64, bool, bool)]) -> PacketNumbers {
        let mut numbers = PacketNumbers::default();
        packets.iter().for_each(|(number, sync, pages)| numbers.took(*number, *sync, *pages));
        numbers
    }

    #[test]
    fn a_channel_that_nobody_reads_is_found_at_the_second_barrier() {
        // Two of three channels, whose numbers at the first barrier are the lowest.
        let mut seen = numbers(&[(0, true, false), (1, true, false)]);
        assert_eq!(seen.check(), Ok(()));
        seen.add(numbers(&[(3, false, true), (5, true, false), (6, true, false)]));
        assert_eq!(seen.check(), Err(MissingPackets { sent: 7, arrived: 5 }));
        seen.add(numbers(&[(2, true, false), (4, false, true)]));
        assert_eq!(seen.check(), Ok(()));
    }

    #[test]
    fn a_sync_that_takes_the_place_of_a_number_is_no_loss() {
        // Number 1 became 2 when the SYNC was added to its packet, and an empty packet repeats it.
        let seen = numbers(&[(0, true, false), (2, true, true), (2, false, false)]);
        assert_eq!(seen.check(), Ok(()));
    }

    #[test]
    fn numbers_that_count_nothing_prove_nothing() {
        assert_eq!(numbers(&[(0, true, false), (0, false, true), (0, true, false)]).check(), Ok(()));
        assert!(numbers(&[(u64::MAX, true, false)]).check().is_err(), "and none overflows");
    }
}
