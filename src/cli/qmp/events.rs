//! What happens in a migration as events of the monitor.

use std::time::{SystemTime, UNIX_EPOCH};

use ramwire::observe::{Event, EventKind};
use serde_json::{Value, json};

use super::kind::{Kind, Member};

/// The events with what they carry.
pub(super) static NAMES: &[(&str, &[Member])] = &[
    ("MIGRATION", &[Member::needed("status", Kind::Text)]),
    ("MIGRATION_PASS", &[Member::needed("pass", Kind::SIZE)]),
];

/// Turns one into the other.
#[derive(Debug, Default)]
pub(super) struct Translator {
    /// Merges of the dirty logs so far.
    passes: u64,
    /// The guest is paused, and is held.
    held: bool,
}

impl Translator {
    /// The messages for `event`; none if QEMU has no event for it. `holds`: the migration waits before its switchover
    /// for a command to continue; QEMU reports `device` only after that.
    pub(super) fn translate(&mut self, event: &Event, holds: bool) -> Vec<Value> {
        let status = match &event.kind {
            EventKind::Setup => "setup",
            EventKind::Active => "active",
            EventKind::Switchover if holds => return Vec::new(),
            EventKind::Switchover => "device",
            EventKind::PreSwitchover => {
                self.held = true;
                "pre-switchover"
            }
            EventKind::SyncBegins { last: true } if self.held => "device",
            EventKind::PostcopyActive => "postcopy-active",
            EventKind::PostcopyPaused => "postcopy-paused",
            EventKind::PostcopyRecover => "postcopy-recover",
            EventKind::Completed => "completed",
            EventKind::Failed { .. } => "failed",
            // With QEMU it is a state of its own.
            EventKind::Cancelled => return vec![state(event, "cancelling"), state(event, "cancelled")],
            EventKind::InDoubt { .. } => "in-doubt",
            EventKind::Synced { .. } => {
                self.passes += 1;
                return vec![line(event, "MIGRATION_PASS", &json!({"pass": self.passes}))];
            }
            _ => return Vec::new(),
        };
        vec![state(event, status)]
    }
}

fn state(event: &Event, status: &str) -> Value {
    line(event, "MIGRATION", &json!({"status": status}))
}

fn line(event: &Event, name: &str, data: &Value) -> Value {
    let at = SystemTime::now().checked_sub(event.at.elapsed()).unwrap_or(UNIX_EPOCH);
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "timestamp": {"seconds": since.as_secs(), "microseconds": since.subsec_micros()},
        "event": name,
        "data": data,
    })
}
