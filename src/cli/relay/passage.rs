//! `ramwire relay --recover`: a paused postcopy goes on through here.

use ramwire::session::{Error, Passage, PassageReport, Spawner};
use ramwire::sys::{CancelToken, Stop};
use ramwire::transport::connect;
use serde_json::json;

use super::super::args::Exit;
use super::super::common::complain;
use super::super::output::{note, result_line};
use super::super::remedies::in_words;
use super::super::signals::cancel_on_signal;
use super::super::tls::warn_if_unencrypted;
use super::doubt::GO_ON_AGAIN;
use super::{Args, listen_at};

/// Passes the connections on until all memory has come, or one is lost.
pub(super) fn run(args: &Args) -> Result<Exit, Box<dyn std::error::Error>> {
    let cancel = CancelToken::default();
    let _signals = cancel_on_signal(vec![cancel.clone()]);
    let (listen, far) = (args.listen_tls.at(&args.listen, &args.tls)?, args.tls.at(&args.connect)?);
    warn_if_unencrypted("relay", &far, "use a network you trust, or --tls-dir DIR");
    let mut listener = listen_at(args, &listen, &Stop::on(&cancel))?;
    let options = args.timeouts.both.stream_options();
    let passage = Passage {
        from_source: Box::new(move |stop: &Stop| listener.accept(&options, stop)),
        to_far_end: Box::new(move |stop: &Stop| connect(&far, &options, stop)),
        cancel: cancel.clone(),
        spawner: Spawner::default(),
    };
    Ok(tell(args, &passage.run()))
}

fn tell(args: &Args, report: &PassageReport) -> Exit {
    let exit = match (report.completed, report.began, &report.error) {
        (true, ..) => Exit::Done,
        (false, true, _) => Exit::InDoubt,
        (false, false, None | Some(Error::Cancelled)) => Exit::Cancelled,
        (false, false, Some(_)) => Exit::Failed,
    };
    if let Some(error) = &report.error {
        complain("relay", error);
    }
    if args.json {
        let out = json!({
            "outcome": exit.word(),
            "error": report.error.as_ref().map(|error| in_words(error)),
            "completed": report.completed,
            "passed_bytes": report.forwarded,
            "further_connections": report.further,
        });
        result_line!("{out}");
    }
    if exit == Exit::InDoubt {
        note!("ramwire relay: {GO_ON_AGAIN}");
    }
    exit
}
