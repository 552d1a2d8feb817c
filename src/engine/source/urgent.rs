//! When the connection for urgent pages is opened. QEMU 7.2 reads nothing before it is open; later versions treat it as
//! another migration if it is opened before they have read from the main connection.

use super::{BehindUrgent, Lost, Phase, SourceAction, SourceEngine, UrgentChannel};

impl SourceEngine {
    /// When the connection for urgent pages is opened, if there is one.
    pub fn urgent(&self) -> Option<UrgentChannel> {
        self.config.urgent
    }

    /// Opens the connection if this is the time for it, and continues with `next`.
    pub(super) fn open_urgent(&mut self, time: UrgentChannel, next: BehindUrgent) {
        if self.config.urgent == Some(time) {
            return self.go(Phase::OpeningUrgent(next), SourceAction::OpenUrgent);
        }
        self.behind_urgent(next);
    }

    pub(super) fn behind_urgent(&mut self, next: BehindUrgent) {
        match next {
            BehindUrgent::SetUp => self.go(Phase::SettingUp, SourceAction::SendSetup),
            BehindUrgent::Pause => {
                self.postcopy.begun = true;
                self.pause();
            }
            BehindUrgent::Compare => {
                self.go(Phase::ComparingReceived(Lost::Postcopy), SourceAction::CompareReceived);
            }
            BehindUrgent::Resume => self.go(Phase::ResumingPages, SourceAction::ResumePages),
        }
    }
}
