//! `ramwire ctl`: a small client for the monitor of a ramwire or of a QEMU.

mod client;
mod render;
mod watch;

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::args::Exit;
use super::common::{bytes, complain, seconds};
use super::output::result_line;
use super::qmp::Place;
use client::{Client, ClientError};

/// How long a cancel is waited for.
const CANCELLED: Duration = Duration::from_secs(30);

/// Interval between two queries of the monitor while waiting.
const ASK_INTERVAL: Duration = Duration::from_millis(50);

/// Watches and changes a migration by the monitor (QMP) of the ramwire or the QEMU that runs it.
#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    # Send a guest slowly, show its state, and then lift the bandwidth limit
    ramwire send tcp:10.0.0.7:4444 --dir guest --max-bandwidth 50M --qmp unix:/run/guest.qmp
    ramwire ctl /run/guest.qmp status
    ramwire ctl /run/guest.qmp set bandwidth 0

    # The same of a QEMU started with -qmp unix:/run/vm.qmp,server=on,wait=off
    ramwire ctl /run/vm.qmp watch

EXIT STATUS:
    0 done; 2 bad usage; 3 the monitor refused or could not be reached. watch ends as the migration: 0 completed,
    3 failed, 4 cancelled, 5 not known")]
pub(super) struct Args {
    /// The monitor: a path, unix:PATH or tcp:HOST:PORT
    #[arg(value_parser = place)]
    monitor: Place,
    /// Print JSON: the monitor's answer, or a line for each of several
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    what: What,
}

#[derive(Clone, Debug, clap::Subcommand)]
enum What {
    /// Print the state of the migration
    Status,
    /// Print the state every second and at each change, until the migration ends
    Watch,
    /// Cancel the migration; the guest stays at its source
    Cancel,
    /// Change a limit: bandwidth 500M, downtime 100ms, postcopy-bandwidth 50M, cache 64M, or any of QEMU's parameters
    Set {
        /// bandwidth, downtime, postcopy-bandwidth, cache, or QEMU's name
        name: String,
        /// A size, a time, or JSON for QEMU's names; bandwidth 0 is no limit
        value: String,
    },
    /// Start the guest at the destination now; the rest of its memory follows
    Postcopy,
    /// Continue a migration that is paused before its switchover
    Continue,
    /// Close the connection of a migration that has switched to postcopy, until `recover`
    Pause,
    /// Continue over another connection: at a source to this address, at a destination by listening there
    Recover {
        /// An address, as for `send` and `receive`
        uri: String,
    },
}

fn place(text: &str) -> Result<Place, String> {
    // A path is what names no kind.
    text.parse().or_else(|error| if text.contains(':') { Err(error) } else { format!("unix:{text}").parse() })
}

pub(super) fn run(args: &Args) -> Exit {
    match execute(args) {
        Ok(exit) => exit,
        Err(error) => {
            complain("ctl", &*error);
            Exit::Failed
        }
    }
}

fn execute(args: &Args) -> Result<Exit, Box<dyn std::error::Error>> {
    if let What::Set { name, value } = &args.what
        && let Err(error) = parameter(name, value)
    {
        complain("ctl", &*Box::<dyn std::error::Error>::from(error));
        return Ok(Exit::Usage);
    }
    let mut monitor = Client::connect(&args.monitor)?;
    let nothing = json!({});
    let (answer, told) = match &args.what {
        What::Status => {
            let now = monitor.execute("query-migrate", &nothing)?;
            let told = render::status(&now);
            (now, told)
        }
        What::Watch => return Ok(watch::run(&mut monitor, args.json)?),
        What::Cancel => return Ok(cancel(&mut monitor, args.json)?),
        What::Set { name, value } => {
            let (name, value) = parameter(name, value)?;
            let answer = monitor.execute("migrate-set-parameters", &json!({ name: value }))?;
            let now = monitor.execute("query-migrate-parameters", &nothing)?;
            (answer, format!("{name} is {}", now[name]))
        }
        What::Postcopy => {
            (monitor.execute("migrate-start-postcopy", &nothing)?, "postcopy was asked for".into())
        }
        What::Continue => {
            let held = json!({"state": "pre-switchover"});
            (monitor.execute("migrate-continue", &held)?, "it continues".into())
        }
        What::Pause => {
            (monitor.execute_first("migrate-pause", &nothing)?, "the connection was given up".into())
        }
        What::Recover { uri } => (recover(&mut monitor, uri)?, format!("it continues over {uri}")),
    };
    if args.json {
        result_line!("{answer}")
    } else {
        result_line!("{told}")
    }
    Ok(Exit::Done)
}

/// A destination listens anew; a source connects anew, which is another command for a QEMU.
fn recover(monitor: &mut Client, uri: &str) -> Result<Value, ClientError> {
    match monitor.execute_first("migrate-recover", &json!({"uri": uri})) {
        Err(ClientError::Refused { why: listening, .. }) => {
            let connect = json!({"uri": uri, "resume": true});
            monitor.execute("migrate", &connect).map_err(|error| match error {
                ClientError::Refused { command, why } => {
                    ClientError::Refused { command, why: format!("{why}; as a destination: {listening}") }
                }
                other => other,
            })
        }
        done => done,
    }
}

/// Requests the end and waits for it.
fn cancel(monitor: &mut Client, json: bool) -> Result<Exit, ClientError> {
    monitor.execute("migrate_cancel", &json!({}))?;
    let by = Instant::now() + CANCELLED;
    let status = loop {
        match monitor.execute("query-migrate", &json!({})) {
            Ok(now) => {
                let status = now["status"].as_str().unwrap_or("none").to_owned();
                let goes_on = !["none", "cancelled", "failed", "completed"].contains(&status.as_str());
                if !goes_on || Instant::now() > by {
                    break status;
                }
            }
            // A ramwire whose migration was cancelled has nothing left to do.
            Err(ClientError::Closed) => break "cancelled".into(),
            Err(error) => return Err(error),
        }
        std::thread::sleep(ASK_INTERVAL);
    };
    if json {
        result_line!("{}", json!({"status": status}))
    } else {
        result_line!("{status}")
    }
    Ok(if status == "completed" { Exit::Failed } else { Exit::Done })
}

/// QEMU's name and value for a parameter to set.
fn parameter<'a>(name: &'a str, value: &str) -> Result<(&'a str, Value), String> {
    Ok(match name {
        "bandwidth" => ("max-bandwidth", json!(bytes(value)?)),
        "postcopy-bandwidth" => ("max-postcopy-bandwidth", json!(bytes(value)?)),
        "cache" => ("xbzrle-cache-size", json!(bytes(value)?)),
        "downtime" => ("downtime-limit", json!(milliseconds(value)?)),
        // A value that is no JSON is a string.
        _ => (name, serde_json::from_str(value).unwrap_or_else(|_| json!(value))),
    })
}

/// `100ms`, `0.5s`.
fn milliseconds(text: &str) -> Result<u64, String> {
    let time = match (text.strip_suffix("ms"), text.strip_suffix('s')) {
        (Some(number), _) => seconds(number)? / 1000,
        (None, Some(number)) => seconds(number)?,
        (None, None) => return Err(format!("{text:?}: write 100ms or 0.5s")),
    };
    u64::try_from(time.as_millis()).map_err(|_| format!("{text:?} is not a possible time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_with_units() {
        assert_eq!(parameter("bandwidth", "500M"), Ok(("max-bandwidth", json!(500 << 20))));
        assert_eq!(parameter("bandwidth", "0"), Ok(("max-bandwidth", json!(0))));
        assert_eq!(parameter("downtime", "100ms"), Ok(("downtime-limit", json!(100))));
        assert_eq!(parameter("downtime", "1.5s"), Ok(("downtime-limit", json!(1500))));
        assert_eq!(parameter("multifd-channels", "4"), Ok(("multifd-channels", json!(4))));
        assert_eq!(parameter("multifd-compression", "zstd"), Ok(("multifd-compression", json!("zstd"))));
        for (name, wrong) in [("bandwidth", "fast"), ("downtime", "100"), ("downtime", "-1s"), ("cache", "")]
        {
            assert!(parameter(name, wrong).is_err(), "{name} {wrong}");
        }
    }

    #[test]
    fn a_monitor_is_a_path_or_has_a_kind() {
        assert_eq!(place("/run/x.qmp"), Ok(Place::Unix("/run/x.qmp".into())));
        assert_eq!(place("unix:x"), Ok(Place::Unix("x".into())));
        assert_eq!(place("tcp:[::1]:44"), Ok(Place::Tcp("[::1]:44".into())));
        for wrong in ["", "tcp:host", "tcp:host:port", "rdma:host:1", "unix:"] {
            assert!(place(wrong).is_err(), "{wrong}");
        }
    }
}
