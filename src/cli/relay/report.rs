//! What a relay reports at its end.

use ramwire::engine::{Ending, RelayEnding};
use ramwire::session::{Error, RelayReport};
use ramwire::transport::ChosenTransport;
use serde_json::json;

use super::super::args::Exit;
use super::super::common::complain;
use super::super::converge::print_remedies;
use super::super::output::{note, result_line, result_text};
use super::super::remedies::in_words;
use super::super::render;
use super::super::store::keep;
use super::doubt::{AT_ITS_SOURCE, GO_ON_WITHOUT, LOOK_THERE, UNANSWERED};
use super::{Args, REMEDIES};

pub(super) fn tell(
    args: &Args,
    near: &ChosenTransport,
    far: Option<&ChosenTransport>,
    report: &RelayReport,
    called_off: bool,
) -> Exit {
    let errors = [report.received.error.as_ref(), report.sent.as_ref().and_then(|sent| sent.error.as_ref())];
    // "Cancelled" says that the guest runs on at its source, which is not certain at the other ends.
    let is_told = |error: &&Error| report.ending == RelayEnding::Failed || !matches!(error, Error::Cancelled);
    for error in errors.into_iter().flatten().filter(is_told) {
        complain("relay", error);
        print_remedies("relay", Some(error), REMEDIES);
    }
    let exit = exit_of(report, called_off);
    if args.json {
        let way = |way: &ChosenTransport| json!({ "transport": way.transport, "why": way.why });
        let connect = far.map(way);
        let far = report.sent.as_ref().map(|sent| {
            let mut out = sent.statistics.query_migrate();
            out["rounds"] = json!(sent.statistics.rounds);
            out["downtime-parts"] = json!(sent.statistics.downtime_parts);
            out["zero-copy"] = json!(sent.statistics.zero_copy);
            out["splice"] = json!(sent.statistics.splice);
            out["urgent-pages"] = json!(sent.urgent_pages);
            out
        });
        let scan = report.received.scan.map(|scan| {
            json!({
                "scans": scan.scans,
                "pages": scan.pages,
                "found": scan.found,
                "took_ms": scan.took.as_secs_f64() * 1e3,
                "last_ms": scan.last.as_secs_f64() * 1e3,
                "memory_bytes": scan.memory,
            })
        });
        let error = errors.into_iter().flatten().next().map(|error| in_words(error));
        let out = json!({
            "outcome": exit.word(),
            "error": error,
            "completed": report.received.ending == Ending::Running,
            "received_pages": report.received.pages,
            "received_bytes": report.received.bytes,
            "received_urgent_pages": report.received.missing_pages.as_ref().map(|missing| missing.preempt_pages),
            "first_page_sent_ms": report.first_page_sent.map(|time| time.as_secs_f64() * 1e3),
            "ram_complete_ms": report.ram_complete.map(|time| time.as_secs_f64() * 1e3),
            "listen": way(near),
            "connect": connect,
            "scan": scan,
            "far": far,
        });
        result_line!("{out}");
    } else if let (Ending::Running, Some(sent)) = (report.received.ending, &report.sent) {
        result_text!("{}", render::statistics(&sent.statistics));
        if let Some(scan) = &report.received.scan {
            result_line!(
                "{} scans for what came by RDMA: {:.0} ms in all, {} of {} scanned pages had changed",
                scan.scans,
                scan.took.as_secs_f64() * 1e3,
                scan.found,
                scan.pages
            );
        }
    }
    match report.ending {
        RelayEnding::Running => {}
        RelayEnding::Incomplete => note!("ramwire relay: {GO_ON_WITHOUT}"),
        RelayEnding::Failed | RelayEnding::InDoubt if report.switched => {
            note!("ramwire relay: {AT_ITS_SOURCE}")
        }
        RelayEnding::Failed | RelayEnding::InDoubt => keep_guest(args, report),
        RelayEnding::Unanswered => {
            note!("ramwire relay: {UNANSWERED}");
            keep_guest(args, report);
        }
    }
    exit
}

pub(super) fn exit_of(report: &RelayReport, called_off: bool) -> Exit {
    match report.ending {
        RelayEnding::Running => Exit::Done,
        // A ramwire that has handed over its guest never resumes it by itself.
        RelayEnding::Failed if report.received.ending == Ending::Stranded => Exit::InDoubt,
        RelayEnding::InDoubt | RelayEnding::Incomplete | RelayEnding::Unanswered => Exit::InDoubt,
        // Either end may notice first that the other has gone: the request decides, not the error.
        RelayEnding::Failed if called_off => Exit::Cancelled,
        RelayEnding::Failed => Exit::Failed,
    }
}

/// Saves a guest whose device state has arrived and whose source may have released it.
pub(super) fn keep_guest(args: &Args, report: &RelayReport) {
    let Some(kept) = &report.kept else { return };
    let Some(state) = &kept.state else { return };
    // A source that received the failure resumes the guest.
    let told = kept.incoming.has_return_path && report.received.ending != Ending::Stranded;
    let may_run = told || report.ending == RelayEnding::InDoubt;
    let Some(dir) = &args.keep else {
        if report.ending == RelayEnding::InDoubt && !told {
            note!("ramwire relay: {LOOK_THERE}. --keep DIR would have kept it here as well");
        } else if report.ending == RelayEnding::Unanswered {
            note!("ramwire relay: --keep DIR would have kept the guest here as well");
        }
        return;
    };
    match keep(dir, &kept.incoming, &*kept.memory, state, may_run) {
        Ok(()) if report.ending == RelayEnding::InDoubt => note!(
            "ramwire relay: the guest is in {0}, in doubt: look at the far end and at the source; if it runs at neither, \
             `ramwire send URI --dir {0} --destination-is-dead` sends it on",
            dir.display()
        ),
        Ok(()) if may_run => note!(
            "ramwire relay: the guest is in {0}, in doubt, since its source lets it run again; if it does not run there, \
             `ramwire send URI --dir {0} --destination-is-dead` sends it on",
            dir.display()
        ),
        Ok(()) => note!(
            "ramwire relay: the guest is in {0}; if it does not run at its source, `ramwire send URI --dir {0}` \
             sends it on",
            dir.display()
        ),
        Err(error) => complain("relay", &error),
    }
}
