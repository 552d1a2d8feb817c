//! The position of the stream between its sections.

use crate::stream::qemu::incoming::{Event, SectionKind};
use crate::stream::qemu::section::Phase;

/// State from the sections so far.
#[derive(Debug, Default)]
pub(super) struct Sections {
    /// Phase of the RAM section that was begun last.
    ram_phase: Option<Phase>,
    ram_ended: bool,
    /// The last item was the end of a section of RAM, or of its records.
    between_rounds: bool,
    in_native_state: bool,
    /// Where the copied section begins in the buffer.
    carried_at: usize,
}

impl Sections {
    /// Records an event that is not a page.
    pub(super) fn note(&mut self, event: &Event<'_>) {
        match event {
            Event::SectionStart { kind: SectionKind::Ram, phase, .. } => self.ram_phase = Some(*phase),
            Event::SectionEnd { kind: SectionKind::Ram, phase: Phase::End } => self.ram_ended = true,
            Event::SectionStart { kind: SectionKind::NativeState, .. } => self.in_native_state = true,
            Event::SectionEnd { kind: SectionKind::NativeState, .. } => self.in_native_state = false,
            _ => {}
        }
        self.between_rounds = match event {
            Event::RecordsEnd | Event::SectionEnd { kind: SectionKind::Ram, .. } => true,
            Event::Command(_) => self.between_rounds,
            _ => false,
        };
    }

    /// Whether more pages follow a page. Not in the last section: the source's guest waits for its end.
    pub(super) fn pages_follow(&self) -> bool {
        self.ram_phase == Some(Phase::Part)
    }

    /// The RAM section that was begun last is the final one.
    pub(super) fn is_last_round(&self) -> bool {
        self.ram_phase == Some(Phase::End)
    }

    /// Pages have begun: from here on other sections come after pages.
    pub(super) fn pages_began(&self) -> bool {
        matches!(self.ram_phase, Some(Phase::Part | Phase::End))
    }

    /// The last page has been received.
    pub(super) fn ram_ended(&self) -> bool {
        self.ram_ended
    }

    /// Between two rounds, where a source may be silent for long. The end of the setup does not count.
    pub(super) fn between_rounds(&self) -> bool {
        self.between_rounds && self.ram_phase == Some(Phase::Part) && !self.ram_ended
    }

    /// Rounds follow again, from the beginning of one.
    pub(super) fn forget_switchover(&mut self) {
        if self.pages_began() {
            self.ram_phase = Some(Phase::Part);
        }
        (self.ram_ended, self.in_native_state, self.between_rounds) = (false, false, true);
    }

    /// A copied section begins at this offset.
    pub(super) fn carried_from(&mut self, at: usize) {
        self.carried_at = at;
    }

    /// Where the copied section began.
    pub(super) fn carried_at(&self) -> usize {
        self.carried_at
    }

    pub(super) fn in_native_state(&self) -> bool {
        self.in_native_state
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::qemu::command::Command;

    fn start(kind: SectionKind, phase: Phase) -> Event<'static> {
        Event::SectionStart { phase, id: 7, kind }
    }

    #[test]
    fn rounds_and_their_end_are_told_apart() {
        let mut sections = Sections::default();
        sections.note(&start(SectionKind::Ram, Phase::Start));
        assert!(!sections.pages_began() && !sections.pages_follow() && !sections.between_rounds());
        sections.note(&Event::SectionEnd { phase: Phase::Start, kind: SectionKind::Ram });
        assert!(!sections.between_rounds(), "pages are due");
        sections.note(&start(SectionKind::Ram, Phase::Part));
        assert!(sections.pages_began() && sections.pages_follow() && !sections.between_rounds());
        sections.note(&Event::RecordsEnd);
        sections.note(&Event::Command(Command::Ping(1)));
        assert!(sections.between_rounds(), "a PING changes nothing");
        sections.note(&start(SectionKind::Ram, Phase::End));
        assert!(sections.is_last_round() && !sections.pages_follow() && !sections.ram_ended());
        sections.note(&Event::SectionEnd { phase: Phase::End, kind: SectionKind::Ram });
        assert!(sections.ram_ended() && !sections.between_rounds(), "nobody waits between rounds any more");
    }

    #[test]
    fn device_state_of_a_ramwire_is_a_section_of_its_own() {
        let mut sections = Sections::default();
        sections.note(&start(SectionKind::NativeState, Phase::Full));
        assert!(sections.in_native_state());
        sections.note(&Event::SectionBytes(b"state"));
        assert!(sections.in_native_state());
        sections.note(&Event::SectionEnd { phase: Phase::Full, kind: SectionKind::NativeState });
        assert!(!sections.in_native_state());
    }
}
