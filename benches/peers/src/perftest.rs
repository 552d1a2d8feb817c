//! The programs of perftest: the performance of bare RDMA WRITEs and READs on a device.

use std::io;
use std::net::IpAddr;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rdma_hooks::verbs::devices;

use crate::{BenchError, migrate::Run};

/// Bytes of a WRITE or READ of the bandwidth tests.
const PIECE_BYTES: u64 = 1 << 20;
/// The unit of its figures, which it calls MB.
const MIB: f64 = (1u64 << 20) as f64;
/// Maximum number of runs until a figure is printed.
const ATTEMPTS: u32 = 3;
/// How long the client retries until the server listens.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// A device and one of its addresses.
#[derive(Clone, Debug)]
pub struct Device {
    name: String,
    host: String,
}

impl Device {
    /// The device with the address `host`.
    ///
    /// # Errors
    /// [`BenchError`] if no device has, or perftest is not installed.
    pub fn at(host: &str) -> Result<Self, BenchError> {
        let mut program = Command::new("ib_write_bw");
        program.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        if program.status().is_err() {
            let remedy = "install perftest (ci/setup does)".to_owned();
            return Err(BenchError::Missing { program: "ib_write_bw".into(), remedy });
        }
        let address: Option<IpAddr> = host.parse().ok();
        let found =
            devices().map_err(|error| BenchError::NoRdma(Box::new(error)))?.into_iter().find(|device| {
                device.ports.iter().flat_map(|port| &port.addresses).any(|ip| Some(*ip) == address)
            });
        let missing = || BenchError::Missing {
            program: format!("a device with the address {host}"),
            remedy: "give --host the IP address of one; `ramwire devices` lists them".into(),
        };
        Ok(Self { name: found.ok_or_else(missing)?.name, host: host.to_owned() })
    }

    /// `ib_write_bw` of 1 MiB, until `bytes` bytes were written.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn bandwidth(&self, bytes: u64) -> Result<Run, BenchError> {
        let seconds = bytes as f64 / self.rate("ib_write_bw", bytes)?;
        Ok(Run { seconds, ..Run::default() })
    }

    /// `ib_read_bw` of 1 MiB, until `bytes` bytes were read: bytes a second.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn read_rate(&self, bytes: u64) -> Result<f64, BenchError> {
        self.rate("ib_read_bw", bytes)
    }

    fn rate(&self, program: &str, bytes: u64) -> Result<f64, BenchError> {
        let count = bytes.div_ceil(PIECE_BYTES).max(5);
        let arguments = [format!("--size={PIECE_BYTES}"), format!("--iters={count}")];
        // #bytes, #iterations, peak, average, message rate.
        let rate = self.measured(program, &arguments, |columns| columns.get(3).copied())?;
        Ok(rate * MIB)
    }

    /// `ib_write_lat` with `count` round trips of `size` bytes: median and 99th percentile of half of them, in
    /// microseconds.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn latency(&self, size: usize, count: u64) -> Result<(f64, f64), BenchError> {
        self.times("ib_write_lat", size, count)
    }

    /// `ib_read_lat` with `count` READs of `size` bytes: median and 99th percentile of them, in microseconds.
    ///
    /// # Errors
    /// [`BenchError`].
    pub fn read_latency(&self, size: usize, count: u64) -> Result<(f64, f64), BenchError> {
        self.times("ib_read_lat", size, count)
    }

    fn times(&self, program: &str, size: usize, count: u64) -> Result<(f64, f64), BenchError> {
        let arguments = [format!("--size={size}"), format!("--iters={}", count.clamp(100, 1_000_000))];
        // #bytes, #iterations, min, max, typical, average, deviation, 99 %, 99.9 %.
        let mut p99 = 0.0;
        let median = self.measured(program, &arguments, |columns| {
            p99 = columns.get(7).copied()?;
            columns.get(4).copied()
        })?;
        Ok((median, p99))
    }

    /// Runs a test until it prints a figure. It counts processor cycles and divides by a frequency that it reads or
    /// measures; on a busy emulated machine this sometimes gives 0, `inf` or `nan`.
    fn measured(
        &self,
        program: &str,
        arguments: &[String],
        mut figure: impl FnMut(&[f64]) -> Option<f64>,
    ) -> Result<f64, BenchError> {
        let mut said = String::new();
        for _ in 0..ATTEMPTS {
            said = self.run(program, arguments)?;
            let found = figures(&said).and_then(|columns| figure(&columns));
            if let Some(found) = found.filter(|found| found.is_finite() && *found > 0.0) {
                return Ok(found);
            }
        }
        let answer = format!("{ATTEMPTS} runs told no usable figure, the last one said:\n{said}");
        Err(BenchError::Refused { who: program.to_owned(), what: "to measure".into(), answer })
    }

    /// Runs a test's server and its client; returns the client's output.
    fn run(&self, program: &str, arguments: &[String]) -> Result<String, BenchError> {
        let port = crate::qemu::free_port().map_err(failed(program, "choosing a port"))?;
        let command = || {
            let mut command = Command::new(program);
            command.args(["-d", &self.name, "-F", "-p", &port.to_string()]).args(arguments);
            command.stdin(Stdio::null());
            command
        };
        let mut server =
            Server(command().stdout(Stdio::null()).spawn().map_err(failed(program, "starting"))?);
        let begun = Instant::now();
        loop {
            let Output { status, stdout, stderr } =
                command().arg(&self.host).output().map_err(failed(program, "starting"))?;
            if status.success() {
                server.0.wait().map_err(failed(program, "waiting"))?;
                return Ok(String::from_utf8_lossy(&stdout).into_owned());
            }
            if begun.elapsed() > CONNECT_TIMEOUT || !matches!(server.0.try_wait(), Ok(None)) {
                let answer =
                    format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
                return Err(BenchError::Refused {
                    who: program.to_owned(),
                    what: "to measure".into(),
                    answer,
                });
            }
            // The server did not listen yet.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

/// The numbers of the line after the line that begins with `#bytes`.
fn figures(text: &str) -> Option<Vec<f64>> {
    let mut lines = text.lines().skip_while(|line| !line.trim_start().starts_with("#bytes"));
    let line = lines.nth(1)?;
    line.split_whitespace().map(|word| word.parse().ok()).collect()
}

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        // Both calls fail for a process that was already reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn failed(who: &str, doing: &'static str) -> impl Fn(io::Error) -> BenchError {
    let who = who.to_owned();
    move |source| BenchError::Io { who: who.clone(), doing, source }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_figures_stand_under_their_names() {
        let text = " Transport type : IB\n---\n #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]\n 1048576 \
                    128   29.50   29.10  0.000029\n---\n";
        assert_eq!(figures(text).unwrap()[..4], [1048576.0, 128.0, 29.5, 29.1]);
        assert_eq!(figures("nothing\n"), None);
        assert_eq!(figures("#bytes\nno numbers\n"), None);
    }
}
