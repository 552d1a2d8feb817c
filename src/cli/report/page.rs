//! The page: the result in words and numbers, then the charts. The template escapes every text.

use maud::{DOCTYPE, Markup, PreEscaped, html};
use ramwire::observe::Status;

use super::charts::Picture;
use super::read::Run;
use crate::cli::common::human_bytes;

const STYLE: &str = include_str!("style.css");

/// Maximum number of rounds in the table; a longer run shows both ends.
const MAX_ROWS: usize = 200;

/// The whole page.
pub(super) fn page(run: &Run, pictures: &[Picture]) -> String {
    let title = format!("ramwire {}: {}", run.description.command, outcome(run).0);
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    (head(run))
                    @for picture in pictures { (figure(picture)) }
                    (rounds(run))
                    (settings(run))
                }
            }
        }
    }
    .into_string()
}

/// The result, and the class of its colour.
fn outcome(run: &Run) -> (String, &'static str) {
    match run.end.as_ref().map(|end| end.status) {
        Some(Status::Completed) => ("completed".into(), "good"),
        Some(Status::InDoubt) => ("in doubt".into(), "bad"),
        Some(Status::Cancelled) => ("cancelled".into(), "fair"),
        Some(_) => ("failed".into(), "bad"),
        None => ("cut off".into(), "bad"),
    }
}

fn head(run: &Run) -> Markup {
    let about = &run.description;
    let (outcome, class) = outcome(run);
    html! {
        header {
            h1 { "Migration " span class=(class) { (outcome) } }
            p { (human_bytes(about.ram_bytes)) " of RAM by " strong { (about.transport) } ": " (about.why) }
            @match &run.end {
                Some(end) => {
                    @if let Some(error) = &end.error { p class="notice" { (error) } }
                    dl {
                        (fact("total", &seconds(end.total_ms)))
                        (fact("downtime", &seconds(end.downtime_ms)))
                        (fact("sent", &human_bytes(end.transferred)))
                        (fact("rate", &format!("{}/s", human_bytes(end.throughput))))
                        (fact("rounds", &end.rounds.to_string()))
                        (fact("whole pages", &end.pages.normal.to_string()))
                        (fact("zero pages", &end.pages.zero.to_string()))
                        (fact("differences", &end.pages.delta.to_string()))
                    }
                }
                None => (cut_off(run)),
            }
        }
    }
}

/// The information in a log without an end.
fn cut_off(run: &Run) -> Markup {
    let last = run.events.last();
    html! {
        p class="notice" {
            "The log ends " (seconds(run.last_ms())) " after its begin, in the middle of the migration. How that ended is not \
             known from this file."
            @if run.torn { " Its last line is not whole." }
            @if let Some(last) = last {
                " The last change of state was \u{201c}" (last.event) "\u{201d} at " (seconds(last.at_ms))
                @if let Some(why) = &last.why { " (" (why) ")" }
                "."
            }
        }
        @if let Some(sample) = run.samples.last() {
            dl {
                (fact("sent by then", &human_bytes(sample.transferred)))
                (fact("left then", &human_bytes(sample.remaining)))
                (fact("rounds by then", &sample.round.to_string()))
            }
        }
    }
}

fn fact(name: &str, value: &str) -> Markup {
    html! { div { dt { (name) } dd { (value) } } }
}

fn figure(picture: &Picture) -> Markup {
    html! {
        figure {
            h2 { (picture.title) }
            @if !picture.legend.is_empty() {
                ul class="legend" {
                    @for (index, name) in picture.legend.iter().enumerate() {
                        li { span class={ "swatch s" (index) } {} (name) }
                    }
                }
            }
            div class="wide" role="img" aria-label=(picture.title) { (PreEscaped(&picture.wide)) }
            div class="narrow" role="img" aria-label=(picture.title) { (PreEscaped(&picture.narrow)) }
            figcaption { (picture.says) }
        }
    }
}

fn rounds(run: &Run) -> Markup {
    let skipped = run.rounds.len().saturating_sub(MAX_ROWS);
    let shown = run
        .rounds
        .iter()
        .enumerate()
        .filter(|(index, _)| *index < MAX_ROWS / 2 || *index >= MAX_ROWS / 2 + skipped);
    html! {
        details {
            summary { "All figures of the rounds" @if skipped > 0 { " (" (skipped) " in the middle are left out)" } }
            div class="scroll" {
                table {
                    thead { tr {
                        @for name in ["round", "ended, s", "took, ms", "dirty pages", "whole", "zero", "difference", "sent",
                            "rate", "written, pages/s", "throttle", "expected downtime, ms"] { th { (name) } }
                    } }
                    tbody { @for (_, round) in shown {
                        @let report = &round.report;
                        tr {
                            td { (report.round) @if report.paused { " (paused)" } }
                            td { (format!("{:.3}", round.at_ms / 1e3)) }
                            td { (format!("{:.1}", report.took_ms)) }
                            td { (report.dirty_pages) }
                            td { (report.pages.normal) }
                            td { (report.pages.zero) }
                            td { (report.pages.delta) }
                            td { (human_bytes(report.bytes)) }
                            td { (human_bytes(report.throughput)) "/s" }
                            td { (report.dirty_pages_rate) }
                            td { (report.throttle_percent) " %" }
                            td { (report.expected_downtime_ms.map_or_else(|| "-".into(), |ms| format!("{ms:.1}"))) }
                        }
                    } }
                }
            }
        }
    }
}

fn settings(run: &Run) -> Markup {
    let plain = |value: &serde_json::Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    html! {
        details {
            summary { "Settings" }
            table class="settings" { tbody {
                @for (name, value) in &run.description.settings { tr { th { (name) } td { (plain(value)) } } }
            } }
        }
        footer { "ramwire " (run.version) ", " (run.description.command) }
    }
}

fn seconds(ms: f64) -> String {
    if ms < 1000.0 { format!("{ms:.1} ms") } else { format!("{:.2} s", ms / 1e3) }
}
