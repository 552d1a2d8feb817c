//! `ctl watch`: looks on until the migration ends.

use std::time::Duration;

use serde_json::{Value, json};

use super::super::args::Exit;
use super::super::output::result_line;
use super::client::{Client, ClientError};
use super::render::{line, word};

/// Interval between two queries of the figures.
const INTERVAL: Duration = Duration::from_secs(1);

/// Number of checks for events between two queries.
const POLLS: u32 = 10;

/// Prints the state of the migration until it has ended.
pub(super) fn run(monitor: &mut Client, json: bool) -> Result<Exit, ClientError> {
    let nothing = json!({});
    let mut last = None;
    loop {
        for poll in 0..POLLS {
            let now = match monitor.execute("query-migrate", &nothing) {
                Ok(now) => now,
                // A ramwire ends with its migration; its last event has the result.
                Err(ClientError::Closed) => {
                    tell_events(monitor, json, &mut last);
                    return last.as_deref().and_then(ended).ok_or(ClientError::Closed);
                }
                Err(error) => return Err(error),
            };
            tell_events(monitor, json, &mut last);
            let exit = ended(&word(&now));
            if poll == 0 || exit.is_some() {
                if json { result_line!("{now}") } else { result_line!("{}", line(&now)) }
            }
            if let Some(exit) = exit {
                return Ok(exit);
            }
            std::thread::sleep(INTERVAL / POLLS);
        }
    }
}

fn tell_events(monitor: &mut Client, json: bool, last: &mut Option<String>) {
    for event in monitor.take_events() {
        if let ("MIGRATION", Some(status)) = (name(&event), event["data"]["status"].as_str()) {
            *last = Some(status.to_owned());
        }
        if json {
            result_line!("{event}");
        } else {
            let data = event.get("data").map(|data| format!("  {data}")).unwrap_or_default();
            result_line!("{}{data}", name(&event));
        }
    }
}

fn name(event: &Value) -> &str {
    event["event"].as_str().unwrap_or_default()
}

/// How a migration has ended that is in this state.
fn ended(status: &str) -> Option<Exit> {
    Some(match status {
        "completed" => Exit::Done,
        "failed" => Exit::Failed,
        "cancelled" => Exit::Cancelled,
        "in-doubt" => Exit::InDoubt,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU 11 has a state between the error and `failed`.
    #[test]
    fn p26_a_qemu_that_is_failing_has_not_ended() {
        for goes_on in
            ["failing", "postcopy-device", "postcopy-recover-setup", "postcopy-paused", "cancelling"]
        {
            assert!(ended(goes_on).is_none(), "{goes_on}");
        }
        assert!(matches!(ended("failed"), Some(Exit::Failed)));
    }
}
