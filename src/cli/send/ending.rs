//! How a sent guest ended: to the folder, and to the operator.

use std::path::Path;

use ramwire::engine::Outcome;
use ramwire::observe::Status;
use ramwire::session::SourceReport;
use ramwire::transport::ChosenTransport;
use serde_json::json;

use super::super::args::Exit;
use super::super::common::complain;
use super::super::converge::print_remedies;
use super::super::output::{note, result_line, result_text};
use super::super::remedies::in_words;
use super::super::render;
use super::super::store::{Custody, DOUBT_PASSED, State};
use super::super::verify::in_json;
use super::{Args, REMEDIES};

/// What a second signal leaves behind, after the guest was given away.
pub(super) fn left_behind(status: Status, place: &Path, passed: bool) -> String {
    match status {
        Status::PostcopyActive | Status::PostcopyPaused | Status::PostcopyRecover => incomplete(place),
        _ => format!("in doubt: {}", in_doubt(place, passed)),
    }
}

/// Pages are missing at the destination.
fn incomplete(place: &Path) -> String {
    format!(
        "the guest runs at the destination, but the connection was lost while memory was missing there: it waits where \
         it touches that memory. Keep {0}: only it has that memory. If the guest is lost there, send {0} again with \
         --destination-is-dead",
        place.display()
    )
}

/// Nobody has said that it runs. A guest whose memory was `passed` has no whole copy in the folder any more.
fn in_doubt(place: &Path, passed: bool) -> String {
    if passed {
        return format!("the guest was given away, but no report came that it runs: {DOUBT_PASSED}");
    }
    format!(
        "the guest was given away, but no report came that it runs. Look at the destination: if it runs, delete {}; if it \
         does not, send again with --destination-is-dead",
        place.display()
    )
}

/// Puts into the folder how it ended. A folder that takes no more says less than is known, and never that the guest may
/// be sent.
pub(super) fn settle(custody: Option<&Custody>, exit: Exit) {
    let Some(custody) = custody else { return };
    let settled = match exit {
        Exit::Done => custody.mark(State::Sent),
        Exit::InDoubt => custody.mark(State::InDoubt),
        _ => custody.keep(),
    };
    if let Err(error) = settled {
        complain("send", &error);
    }
}

pub(super) fn tell(args: &Args, way: &ChosenTransport, report: &SourceReport, exit: Exit) {
    if let Some(error) = &report.error {
        complain("send", error);
        print_remedies("send", Some(error), REMEDIES);
    }
    match report.outcome {
        Outcome::Incomplete => note!("{}", incomplete(args.place())),
        Outcome::InDoubt => note!("{}", in_doubt(args.place(), args.cpr.is_some())),
        _ => {}
    }
    if let Some(check) = &report.memory_check {
        note!("ramwire send: {check}");
    }
    if args.json {
        let mut out = report.statistics.query_migrate();
        out["outcome"] = json!(exit.word());
        out["error"] = json!(report.error.as_ref().map(|error| in_words(error)));
        out["transport"] = json!(way.transport);
        out["why"] = json!(way.why);
        out["rounds"] = json!(report.statistics.rounds);
        out["downtime-parts"] = json!(report.statistics.downtime_parts);
        out["zero-copy"] = json!(report.statistics.zero_copy);
        out["splice"] = json!(report.statistics.splice);
        out["urgent-pages"] = json!(report.urgent_pages);
        out["passed"] = json!(report.statistics.passed);
        out["released-pages"] = json!(report.released_pages);
        out["lost-connections"] = json!(report.statistics.lost);
        out["memory-check"] = in_json(report.memory_check.as_ref());
        result_line!("{out}");
    } else if report.outcome == Outcome::Completed {
        result_text!("{}", render::statistics(&report.statistics));
    }
}
