//! query-migrate as text; of a QEMU's answer the fields that it has.

use serde_json::Value;

use super::super::common::human_bytes;

/// The state of a migration, a line for each figure that is there.
pub(super) fn status(now: &Value) -> String {
    let ram = &now["ram"];
    let mut lines = vec![("status", word(now))];
    let mut tell = |name: &'static str, text: Option<String>| lines.extend(text.map(|text| (name, text)));
    tell("sent", ram["transferred"].as_u64().map(human_bytes));
    let left = ram["remaining"].as_u64().zip(ram["total"].as_u64());
    tell("left", left.map(|(left, total)| format!("{} of {}", human_bytes(left), human_bytes(total))));
    tell("speed", rate(ram));
    tell("syncs", ram["dirty-sync-count"].as_u64().map(|count| count.to_string()));
    let ms = |name: &str| now[name].as_u64().map(|ms| format!("{ms} ms"));
    tell("time", ms("total-time"));
    tell(
        "downtime",
        ms("downtime").or_else(|| ms("expected-downtime").map(|text| format!("{text} expected"))),
    );
    tell("throttled", now["cpu-throttle-percentage"].as_u64().map(|share| format!("{share} %")));
    tell("error", now["error-desc"].as_str().map(str::to_owned));
    let lines: Vec<String> = lines.into_iter().map(|(name, text)| format!("{name:<10}{text}")).collect();
    lines.join("\n")
}

/// The same in one line.
pub(super) fn line(now: &Value) -> String {
    let ram = &now["ram"];
    let left = ram["remaining"].as_u64().map(|left| format!("{} left", human_bytes(left)));
    let expected = now["expected-downtime"].as_u64().map(|ms| format!("{ms} ms downtime expected"));
    let parts = [Some(word(now)), rate(ram), left, expected];
    parts.into_iter().flatten().collect::<Vec<_>>().join("  ")
}

/// The status; `none` if the monitor reports none.
pub(super) fn word(now: &Value) -> String {
    now["status"].as_str().unwrap_or("none").to_owned()
}

fn rate(ram: &Value) -> Option<String> {
    let megabits = ram["mbps"].as_f64()?;
    Some(format!("{}/s", human_bytes((megabits * 1e6 / 8.0) as u64)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_an_answer_lacks_is_not_told() {
        assert_eq!(status(&json!({})), "status    none");
        let now = json!({
            "status": "active", "total-time": 2500, "expected-downtime": 40,
            "ram": {"transferred": 1 << 20, "remaining": 3 << 20, "total": 4 << 20, "mbps": 80.0, "dirty-sync-count": 2},
        });
        let lines = [
            "status    active",
            "sent      1.00 MiB",
            "left      3.00 MiB of 4.00 MiB",
            "speed     9.54 MiB/s",
            "syncs     2",
            "time      2500 ms",
            "downtime  40 ms expected",
        ];
        assert_eq!(status(&now), lines.join("\n"));
        assert_eq!(line(&now), "active  9.54 MiB/s  3.00 MiB left  40 ms downtime expected");
    }
}
