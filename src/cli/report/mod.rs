//! `ramwire report`: a run's log as one page with pictures.

mod charts;
mod page;
mod read;

use std::fs::File;
use std::io::{BufReader, Write};
use std::path::PathBuf;

use super::args::Exit;
use super::common::{Usage, failed, is_same_file};
use crate::cli::remedies::in_words;

/// Makes one self-contained HTML page of a log that `--run-log` wrote: no scripts, no other files.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    ramwire demo --run-log run.jsonl
    ramwire report run.jsonl -o report.html")]
pub(super) struct Args {
    /// The log; of a truncated one the page shows what is there, and says so
    #[arg(value_name = "RUN.JSONL")]
    file: PathBuf,
    /// File for the page
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
}

pub(super) fn run(args: &Args) -> Exit {
    report(args).map_or_else(|error| failed("report", &*error), |()| Exit::Done)
}

fn report(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let file = File::open(&args.file).map_err(|error| format!("{}: {error}", args.file.display()))?;
    if is_same_file(&args.file, &args.output) {
        let output = args.output.display();
        return Err(
            Usage(format!("--output {output} is the log itself; name another file for the page")).into()
        );
    }
    let run = read::read(BufReader::new(file))
        .map_err(|error| format!("{}: {}", args.file.display(), in_words(&error)))?;
    let page = page::page(&run, &charts::pictures(&run)?);
    let written = File::create(&args.output).and_then(|mut file| file.write_all(page.as_bytes()));
    Ok(written.map_err(|error| format!("{}: {error}", args.output.display()))?)
}
