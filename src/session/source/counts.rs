//! SENT: what has left, for the destination to compare.

use crate::stream::native::Order;
use crate::stream::page_counts;
use crate::stream::qemu::command::Command;

use super::SourceSession;

impl SourceSession {
    /// SENT: every page that has left, by the way it went.
    pub(super) fn encode_counts(&self, out: &mut Vec<u8>) {
        let mut counts = self.wire.link.sent_pages();
        if let Some(stream) = counts.first_mut() {
            // As deltas none of these travels.
            let aside = self.pages.aside();
            stream.normal += aside.normal;
            stream.zero += aside.zero;
        }
        Command::Native(Order::Sent { counts: &page_counts::encode(&counts) }).encode(out);
    }
}
