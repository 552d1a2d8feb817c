//! The least time in which two cores can move memory by TLS: each byte is encrypted once and decrypted once, at the rates of
//! `openssl speed`, and copied by the kernel, as by a bare loop.

use std::io;
use std::process::Command;

use super::Run;
use super::bed::Bed;
use super::cost::Cost;
use super::floors::{self, Floor};
use crate::BenchError;

/// The cipher that ramwire and QEMU agree on.
const CIPHER: &str = "aes-256-gcm";
/// Cores that encrypt at a time: one at each end.
const CORES: u32 = 2;
/// Bytes of a TLS record.
const RECORD: &str = "16384";

/// The seconds that both take, one after the other, on all cores.
///
/// # Errors
/// [`BenchError`].
pub fn run(floor: Floor, bed: &Bed) -> Result<Run, BenchError> {
    let bare = floors::run(floor, bed)?;
    let kernel = bare.cost().ok_or_else(|| failed(io::Error::other("the bare loop's cost can't be read")))?;
    let bytes = bed.bytes() as f64;
    let crypto = bytes / rate(&[])? + bytes / rate(&["-decrypt"])?;
    let cores = f64::from(CORES);
    let cpu_seconds = crypto * cores + kernel.cpu_seconds;
    let source = Some(Cost { cpu_seconds, ..kernel });
    Ok(Run { seconds: cpu_seconds / cores, source, ..Run::default() })
}

/// Bytes a second on all cores.
fn rate(more: &[&str]) -> Result<f64, BenchError> {
    let mut command = Command::new("openssl");
    command.args(["speed", "-elapsed", "-seconds", "1", "-bytes", RECORD, "-multi", &CORES.to_string()]);
    let output = command.args(["-evp", CIPHER]).args(more).output();
    let output = output.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => BenchError::Missing {
            program: "openssl".into(),
            remedy: "install openssl (OpenSSL's command)".into(),
        },
        _ => failed(error),
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    parse(&text).ok_or_else(|| failed(io::Error::other(format!("its output was `{text}`"))))
}

/// The last line is the cipher and thousands of bytes a second.
fn parse(text: &str) -> Option<f64> {
    let last = text.lines().rfind(|line| !line.trim().is_empty())?;
    let thousands: f64 = last.split_whitespace().last()?.strip_suffix('k')?.parse().ok()?;
    (thousands > 0.0).then_some(thousands * 1e3)
}

fn failed(source: io::Error) -> BenchError {
    BenchError::Io { who: "openssl speed".into(), doing: "measuring", source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_all_cores() {
        let text = "version: 3.0.19\ntype          16384 bytes\nAES-256-GCM   9000123.50k\n";
        assert_eq!(parse(text), Some(9_000_123.5e3));
        for wrong in ["", "AES-256-GCM", "AES-256-GCM 0.00k", "speed: Unknown cipher"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
