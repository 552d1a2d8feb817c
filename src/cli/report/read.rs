//! Reads a run's log. The file is not trusted: sizes are limited, and an error names its line.

use std::io::{self, BufRead, Read};

use ramwire::observe::{DowntimeParts, End, RUN_LOG_SCHEMA, Record, RoundReport, RunDescription, Sample};

/// Longest line; our own have some 400 bytes, plus the settings in the first line.
const MAX_LINE: u64 = 1 << 20;

/// Maximum number of lines: ten days of samples.
const MAX_LINES: usize = 10_000_000;

/// Longest duration in a log, a hundred years in milliseconds: charts stay finite.
const MAX_MS: f64 = 3.2e12;

/// A log that can't be read.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReadError {
    #[error("line {line}: {why}")]
    Line { line: usize, why: String },
    #[error("line {line}")]
    Io {
        line: usize,
        #[source]
        source: io::Error,
    },
}

/// A round and when it ended.
#[derive(Clone, Debug)]
pub(super) struct Round {
    pub(super) at_ms: f64,
    pub(super) remaining: u64,
    pub(super) report: RoundReport,
}

/// An event's time, name and reason.
#[derive(Clone, Debug)]
pub(super) struct Happened {
    pub(super) at_ms: f64,
    pub(super) event: String,
    pub(super) why: Option<String>,
}

/// A run according to its log, each list in the order of time.
#[derive(Clone, Debug, Default)]
pub(super) struct Run {
    pub(super) version: String,
    pub(super) description: RunDescription,
    pub(super) samples: Vec<Sample>,
    pub(super) rounds: Vec<Round>,
    pub(super) events: Vec<Happened>,
    /// `None` if the log is truncated.
    pub(super) end: Option<End>,
    /// The last line is incomplete.
    pub(super) torn: bool,
}

impl Run {
    /// When the last line was written.
    pub(super) fn last_ms(&self) -> f64 {
        let times = [
            self.samples.last().map(|sample| sample.at_ms),
            self.rounds.last().map(|round| round.at_ms),
            self.events.last().map(|event| event.at_ms),
            self.end.as_ref().map(|end| end.at_ms),
        ];
        times.into_iter().flatten().fold(0.0, f64::max)
    }
}

/// Reads all of it.
pub(super) fn read(mut from: impl BufRead) -> Result<Run, ReadError> {
    let mut run = Run::default();
    let mut text = Vec::new();
    for line in 1..=MAX_LINES {
        text.clear();
        let got = from.by_ref().take(MAX_LINE).read_until(b'\n', &mut text);
        got.map_err(|source| ReadError::Io { line, source })?;
        let whole = text.pop_if(|byte| *byte == b'\n').is_some();
        if text.is_empty() && !whole {
            if line == 1 {
                return Err(ReadError::Line { line, why: "the file is empty".into() });
            }
            sort(&mut run);
            return Ok(run);
        }
        if !whole && text.len() as u64 >= MAX_LINE {
            let why = format!("longer than {MAX_LINE} bytes: this is no run's log");
            return Err(ReadError::Line { line, why });
        }
        let taken = parse(&text).and_then(|record| take(&mut run, line, record));
        if let Err(why) = taken {
            // A killed process leaves half a line; the lines before it are still valid.
            if whole || line == 1 {
                return Err(ReadError::Line { line, why });
            }
            run.torn = true;
        }
    }
    Err(ReadError::Line { line: MAX_LINES, why: "no run's log has more lines".into() })
}

/// A line may be written shortly after the line of a later event.
fn sort(run: &mut Run) {
    run.samples.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    run.rounds.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
    run.events.sort_by(|a, b| a.at_ms.total_cmp(&b.at_ms));
}

fn parse(text: &[u8]) -> Result<Record, String> {
    serde_json::from_slice(text).map_err(|error| format!("not a line of a run's log: {error}"))
}

fn take(run: &mut Run, line: usize, record: Record) -> Result<(), String> {
    match (&record, line) {
        (Record::Run { schema, .. }, 1) if *schema != RUN_LOG_SCHEMA => {
            return Err(format!("schema {schema}; this ramwire reads schema {RUN_LOG_SCHEMA}"));
        }
        (Record::Run { .. }, 1) => {}
        (Record::Run { .. }, _) => return Err("a second run begins here; give each its own file".into()),
        (_, 1) => return Err("the first line does not describe a run".into()),
        _ if run.end.is_some() => return Err("the run had ended already".into()),
        _ => {}
    }
    match record {
        Record::Run { ramwire, run: description, .. } => {
            (run.version, run.description) = (ramwire, description)
        }
        Record::Sample(sample) => {
            times(&[sample.at_ms, sample.expected_downtime_ms.unwrap_or(0.0), sample.eta_ms.unwrap_or(0.0)])?;
            run.samples.push(sample);
        }
        Record::Round { at_ms, remaining, round, .. } => {
            times(&[at_ms, round.took_ms, round.expected_downtime_ms.unwrap_or(0.0)])?;
            run.rounds.push(Round { at_ms, remaining, report: round });
        }
        Record::Event { at_ms, event, why } => {
            times(&[at_ms])?;
            run.events.push(Happened { at_ms, event, why });
        }
        Record::End(end) => {
            times(&[end.at_ms, end.total_ms, end.setup_ms, end.downtime_ms])?;
            times(&DowntimeParts::named(&end.downtime_parts).map(|(_, ms)| ms))?;
            run.end = Some(*end);
        }
    }
    Ok(())
}

fn times(ms: &[f64]) -> Result<(), String> {
    let wrong = ms.iter().find(|ms| !(0.0..=MAX_MS).contains(*ms));
    wrong.map_or(Ok(()), |ms| Err(format!("{ms} is not a time in milliseconds")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const FIRST: &str = r#"{"kind":"run","schema":1,"ramwire":"0.1.0","started_unix_ms":1,"command":"send","transport":"tcp","why":"w","ram_bytes":4096,"page_bytes":4096,"settings":{}}"#;
    const EVENT: &str = r#"{"kind":"event","at_ms":2.5,"event":"active","why":null}"#;

    fn error(text: &str) -> String {
        read(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_torn_last_line_is_a_run_cut_off_and_any_other_has_its_number() {
        let run = read(format!("{FIRST}\n{EVENT}\n{}", &EVENT[..20]).as_bytes()).unwrap();
        assert!(run.torn && run.end.is_none() && run.events.len() == 1 && run.last_ms() == 2.5);
        let run = read(format!("{FIRST}\n{EVENT}").as_bytes()).unwrap();
        assert!(!run.torn && run.events.len() == 1, "whole without its newline");
        assert!(
            error(&format!("{FIRST}\n{EVENT}\n{}\n{EVENT}\n", &EVENT[..20]))
                .starts_with("line 3: not a line")
        );
        assert!(error(&FIRST[..40]).starts_with("line 1: "));
    }

    #[test]
    fn hostile_files_are_refused_with_a_line() {
        let cases = [
            ("", "line 1: the file is empty"),
            ("\n", "line 1: not a line"),
            (&format!("{EVENT}\n"), "line 1: the first line does not describe a run"),
            (&FIRST.replace("\"schema\":1", "\"schema\":9"), "line 1: schema 9"),
            (&format!("{FIRST}\n{FIRST}\n"), "line 2: a second run"),
            (&format!("{FIRST}\n{}\n", EVENT.replace("2.5", "-1")), "line 2: -1 is not a time"),
            (&format!("{FIRST}\n{}\n", EVENT.replace("2.5", "1e300")), "line 2: 1"),
            (&format!("{FIRST}\n{}\n", EVENT.replace("2.5", "1e999")), "line 2: not a line"),
            (&format!("{FIRST}\n{}\n", EVENT.replace("event\"", "other\"")), "line 2: not a line"),
            (&format!("{FIRST}\n{}\n", "[".repeat(100_000)), "line 2: not a line"),
            (&format!("{FIRST}\n{}\n", "x".repeat(2 << 20)), "line 2: longer than"),
        ];
        for (text, wanted) in cases {
            assert!(error(text).starts_with(wanted), "{wanted}: {}", error(text));
        }
    }
}
