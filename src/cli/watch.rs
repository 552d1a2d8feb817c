//! Observers of a running migration: the log of rounds, the figures for Prometheus, the progress line.

use std::fs::File;
use std::path::PathBuf;

use ramwire::observe::{RunDescription, SharedStatistics};
use ramwire::ram::RamBlockTable;
use ramwire::session::{RunLog, Spawner};

use super::metrics::MetricsArgs;
use super::output::note;

/// Options of every command that sends.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct WatchArgs {
    /// Write a line of JSON for each round and ten times a second to this file, for `ramwire report`
    #[arg(long, alias = "log-rounds", value_name = "FILE")]
    run_log: Option<PathBuf>,
    #[command(flatten)]
    pub(super) metrics: MetricsArgs,
}

/// The first line of a log, without its settings.
pub(super) fn describe(command: &str, transport: &str, why: &str, table: &RamBlockTable) -> RunDescription {
    RunDescription {
        command: command.into(),
        transport: transport.into(),
        why: why.into(),
        ram_bytes: table.travelling(),
        page_bytes: table.page().bytes(),
        ..RunDescription::default()
    }
}

/// The file of a log, created before anything is sent: a path that can't be written is reported before the migration
/// begins.
pub(super) struct LogFile(Option<(PathBuf, File)>);

impl WatchArgs {
    pub(super) fn create_log(&self) -> Result<LogFile, String> {
        let Some(path) = &self.run_log else { return Ok(LogFile(None)) };
        let file = File::create(path);
        let file = file.map_err(|error| {
            format!("--run-log {}: {error}; name a file that can be written", path.display())
        })?;
        Ok(LogFile(Some((path.clone(), file))))
    }
}

impl LogFile {
    /// Follows a migration that has not begun yet.
    pub(super) fn follow(self, statistics: SharedStatistics, run: RunDescription) -> Log {
        let Some((path, file)) = self.0 else { return Log(None) };
        match RunLog::start(statistics, run, Box::new(file), &Spawner::default()) {
            Ok(log) => Log(Some((path, log))),
            Err(error) => {
                note!("--run-log {}: {error}", path.display());
                Log(None)
            }
        }
    }
}

/// A log that is written.
#[derive(Default)]
pub(super) struct Log(Option<(PathBuf, RunLog)>);

impl Log {
    /// Waits until the log's end is in the file; reports if it could not be written, which is no failure of the
    /// migration.
    pub(super) fn finish(self) {
        if let Some((path, log)) = self.0
            && let Err(error) = log.finish()
        {
            note!("--run-log {}: {error}; the log is not whole", path.display());
        }
    }
}
