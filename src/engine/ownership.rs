//! Who owns a guest whose source has switched to postcopy, as far as its destination knows.
//!
//! ```text
//! [source] -> answer sent -> [unknown] -> proof -> [here]
//!     \________ lost ____________\__ given up __> [given up]
//! ```
//!
//! A source that waits for an answer to its package hands over the guest when that answer arrives. Between sending the
//! answer's first byte and a proof that it has arrived, the destination can't know which end owns the guest, so it
//! neither runs nor discards it. The proof is the acknowledgement of the answer's bytes, or RESUME on another
//! connection: a source that has resumed its guest never sends RESUME.
//!
//! A QEMU resumes its guest when the connection is lost before the answer, so a destination discards what has come. A
//! ramwire does not: it resumes only when the destination reports that it has not started the guest. So the destination
//! keeps what has come while that source may connect again, and sends the answer on the connection that it has then.
//!
//! # Required order
//!
//! A guest that was given up never runs here, and a guest that is owned here is never given up. RESUME is no proof
//! before the answer was sent: the device state may prove to be broken.

/// The owner of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// The source: it resumes its guest when the connection is lost.
    #[default]
    Source,
    /// The source or this end.
    Unknown,
    /// This end.
    Here,
    /// The guest never starts here any more, whatever arrives.
    GivenUp,
}

impl Ownership {
    /// The answer that makes the source hand over its guest is sent next. `false`: it must not be sent.
    #[must_use = "a guest that was given up is not asked for"]
    pub(crate) fn answering(&mut self) -> bool {
        if *self == Self::Source {
            *self = Self::Unknown;
        }
        *self != Self::GivenUp
    }

    /// The source has handed over the guest. `false`: the guest was given up here, and must not run.
    #[must_use = "a guest that was given up must not run"]
    pub(crate) fn proven(&mut self) -> bool {
        if *self != Self::GivenUp {
            *self = Self::Here;
        }
        *self == Self::Here
    }

    /// The connection is lost, or no longer usable. `another`: the source may connect again. `resumes`: a source that
    /// has not the answer resumes its guest now. `true`: the received state is kept.
    #[must_use = "what has come is discarded, or not"]
    pub(crate) fn lost(&mut self, another: bool, resumes: bool) -> bool {
        if (*self == Self::Source && (resumes || !another)) || (*self == Self::Unknown && !another) {
            *self = Self::GivenUp;
        }
        *self != Self::GivenUp
    }

    /// No proof can arrive any more.
    pub(crate) fn give_up(&mut self) {
        if *self != Self::Here {
            *self = Self::GivenUp;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a destination may observe, and what its source does at that moment.
    const EVENTS: [&str; 7] =
        ["answer", "arrives", "acknowledged", "lost for good", "lost", "resume", "give up"];

    /// Goes through every sequence of seven events, together with a source that follows its rules: it owns its guest
    /// until the answer arrives. A QEMU resumes the guest if the connection is lost before that, and sends RESUME only
    /// if it has handed over the guest. A ramwire resumes it when it is told that the guest was given up.
    #[test]
    fn a_guest_runs_at_one_side_at_most_whatever_comes_when() {
        for qemu in [true, false] {
            let (mut runs, mut doubts, mut later) = (0, 0, 0);
            for number in 0..EVENTS.len().pow(7) {
                let mut rest = number;
                let mut owner = Ownership::default();
                let (mut sent, mut given_away, mut resumed, mut runs_here) = (false, false, false, false);
                let (mut given_up, mut early_loss) = (false, false);
                for _ in 0..7 {
                    let event = EVENTS[rest % EVENTS.len()];
                    rest /= EVENTS.len();
                    match event {
                        "answer" => sent |= owner.answering(),
                        "arrives" => given_away |= sent && !resumed,
                        "acknowledged" if given_away => runs_here |= owner.proven(),
                        "resume" if given_away || (!qemu && sent && !resumed) => runs_here |= owner.proven(),
                        "lost" | "lost for good" => {
                            early_loss |= owner == Ownership::Source;
                            resumed |= qemu && !given_away;
                            given_up |= !owner.lost(event == "lost", qemu);
                            doubts += u32::from(owner == Ownership::Unknown);
                        }
                        "give up" => owner.give_up(),
                        _ => {}
                    }
                    // The report of it arrives.
                    resumed |= !qemu && owner == Ownership::GivenUp && !given_away;
                    assert!(!(runs_here && resumed), "{number}: both ends, by {event}");
                    assert!(!(runs_here && (given_up || owner == Ownership::GivenUp)), "{number}: {event}");
                    assert!(!runs_here || owner == Ownership::Here, "{number}: {event}");
                }
                runs += u32::from(runs_here);
                later += u32::from(runs_here && early_loss);
            }
            assert!(runs > 0 && doubts > 0);
            assert_eq!(
                later > 0,
                !qemu,
                "a guest that runs here although the connection was lost before the answer"
            );
        }
    }

    #[test]
    fn a_loss_behind_the_answer_is_no_end_where_the_source_may_connect_again() {
        let mut owner = Ownership::default();
        assert!(owner.answering() && owner.lost(true, true) && owner.lost(true, false));
        assert!(owner.proven() && owner.lost(false, true), "here: whatever comes");
        let mut owner = Ownership::default();
        assert!(owner.answering() && !owner.lost(false, false) && !owner.proven() && !owner.answering());
        let mut owner = Ownership::default();
        assert!(!owner.lost(true, true) && !owner.answering(), "the source has its guest back");
        let mut owner = Ownership::default();
        assert!(owner.lost(true, false) && owner.answering(), "a ramwire waits for the answer");
        let mut owner = Ownership::default();
        assert!(!owner.lost(false, false) && !owner.answering(), "no answer can come any more");
    }
}
