//! The process of a source: another process of this program, which makes the guest's memory, sends it, and prints its cost
//! as a JSON line.

use std::process::{Child, Command, Stdio};

use ramwire::engine::Outcome;
use ramwire::error::Chain;
use ramwire::sys::Stop;
use ramwire::transport::Address;

use super::filled;
use super::ours::{Way, send};
use crate::BenchError;
use crate::migrate::cost::Cost;
use crate::output::result_line;

/// Arguments of the source's process.
#[derive(Clone, Debug, clap::Args)]
pub struct SourceArgs {
    /// Where the destination listens.
    address: Address,
    /// Bytes of memory.
    #[arg(long)]
    bytes: u64,
}

/// Runs the source to its end.
///
/// # Errors
/// [`BenchError`].
pub fn serve(args: &SourceArgs) -> Result<(), BenchError> {
    let memory = filled(args.bytes)?;
    let session = send(&memory, &args.address, Way::default(), &Stop::never())?;
    // What a connection costs does not depend on the memory.
    let before = Cost::own().map_err(failed("counting its cost"))?;
    let report = session.run();
    let cost = Cost::own().map_err(failed("counting its cost"))?.since(before);
    if report.outcome != Outcome::Completed {
        let answer = report.error.map_or_else(String::new, |error| Chain(&error).to_string());
        return Err(BenchError::Refused { who: "ramwire".into(), what: "to send".into(), answer });
    }
    result_line!("{}", serde_json::to_string(&cost).map_err(|error| failed("reporting")(error.into()))?);
    Ok(())
}

fn failed(doing: &'static str) -> impl Fn(std::io::Error) -> BenchError {
    move |source| BenchError::Io { who: "the source's process".into(), doing, source }
}

/// That process, as seen from this one; killed if it was not awaited.
#[derive(Debug)]
pub struct Source(Option<Child>);

impl Source {
    /// Starts one that sends `bytes` of memory to `address`.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn start(address: &Address, bytes: u64) -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(failed("starting"))?;
        let mut command = Command::new(program);
        command.args(["source", &address.to_string(), "--bytes", &bytes.to_string()]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
        Ok(Self(Some(child.map_err(failed("starting"))?)))
    }

    /// Waits for its end and reads its cost.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn finish(mut self) -> Result<Cost, BenchError> {
        let Some(child) = self.0.take() else { return Ok(Cost::default()) };
        let output = child.wait_with_output().map_err(failed("waiting"))?;
        if !output.status.success() {
            return Err(failed("waiting")(std::io::Error::other(output.status.to_string())));
        }
        serde_json::from_slice(&output.stdout).map_err(|error| failed("reporting")(error.into()))
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Both calls fail for a process that was already reaped.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
