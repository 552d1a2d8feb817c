//! iperf3 as a contestant: one buffer, sent repeatedly.

use std::io;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Run;
use super::bed::Bed;
use super::cost::Cost;
use crate::BenchError;

/// A server that is awaited, or killed.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends as many bytes as the bed has.
///
/// # Errors
/// [`BenchError`].
pub fn run(bed: &Bed) -> Result<Run, BenchError> {
    let failed = |doing| {
        move |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => BenchError::Missing {
                program: "iperf3".into(),
                remedy: "install the package iperf3, or leave it out of --against".into(),
            },
            _ => BenchError::Io { who: "iperf3".into(), doing, source },
        }
    };
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
    let port = port.map_err(failed("choosing a port"))?.port().to_string();
    let mut server = Command::new("iperf3");
    server.args(["-s", "-1", "-B", "127.0.0.1", "-p", &port]).stdin(Stdio::null()).stdout(Stdio::null());
    let _server = Server(server.spawn().map_err(failed("starting"))?);
    let begun = Instant::now();
    loop {
        let mut client = Command::new("iperf3");
        client.args(["-c", "127.0.0.1", "-p", &port, "-n", &bed.bytes().to_string(), "-l", "1M", "-J"]);
        let output = client.output().map_err(failed("sending"))?;
        let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        match figures(&report) {
            Some(run) => return Ok(run),
            // The server needs a moment until it listens.
            None if begun.elapsed() < Duration::from_secs(5) => std::thread::sleep(Duration::from_millis(50)),
            None => {
                let answer = report["error"].as_str().unwrap_or("no figures").to_owned();
                return Err(BenchError::Refused { who: "iperf3".into(), what: "to send".into(), answer });
            }
        }
    }
}

fn figures(report: &Value) -> Option<Run> {
    let end = report.get("end")?;
    let seconds = end["sum_received"]["seconds"].as_f64()?;
    let cpu = &end["cpu_utilization_percent"];
    let cost =
        |percent: &Value| Some(Cost { cpu_seconds: seconds * percent.as_f64()? / 100.0, ..Cost::default() });
    let (source, destination) = (cost(&cpu["host_total"]), cost(&cpu["remote_total"]));
    Some(Run { seconds, source, destination, ..Run::default() })
}
