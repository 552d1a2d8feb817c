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

/// Turns one into the other. Counts the syncs.
#[derive(Debug, Default)]
pub(super) struct Translator {
    passes: u64,
}

impl Translator {
    /// The line that tells of `event`; `None` where QEMU has no event for it.
    pub(super) fn translate(&mut self, event: &Event) -> Option<Value> {
        let status = match &event.kind {
            EventKind::Setup => "setup",
            EventKind::Active => "active",
            EventKind::Switchover => "device",
            EventKind::PostcopyActive => "postcopy-active",
            EventKind::PostcopyPaused => "postcopy-paused",
            EventKind::Completed => "completed",
            EventKind::Failed { .. } => "failed",
            EventKind::Cancelled => "cancelled",
            EventKind::InDoubt { .. } => "in-doubt",
            EventKind::Synced { .. } => {
                self.passes += 1;
                return Some(line(event, "MIGRATION_PASS", &json!({"pass": self.passes})));
            }
            _ => return None,
        };
        Some(line(event, "MIGRATION", &json!({"status": status})))
    }
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
