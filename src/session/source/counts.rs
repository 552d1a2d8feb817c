//! SENT: the counts of sent pages, for the destination to compare.

use crate::stream::native::Order;
use crate::stream::page_counts;
use crate::stream::qemu::command::Command;

use super::SourceSession;

impl SourceSession {
    /// SENT: every page that was sent, by its transport.
    pub(super) fn encode_counts(&self, out: &mut Vec<u8>) {
        let mut counts = self.wire.link.sent_pages();
        if let Some(stream) = counts.first_mut() {
            // None of these was sent as a delta.
            let aside = self.pages.aside();
            stream.normal += aside.normal;
            stream.zero += aside.zero;
        }
        Command::Native(Order::Sent { counts: &page_counts::encode(&counts) }).encode(out);
    }
}
