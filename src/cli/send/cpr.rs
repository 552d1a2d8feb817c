//! `send --cpr`: the RAM files become the memory of a process on this host, and no page is sent.

use std::path::Path;

use ramwire::session::{SourceSettings, Verify};
use ramwire::sys::Stop;
use ramwire::transport::{Address, ConnectionOptions, CprSender};

use super::super::common::Usage;
use super::super::store::StoredGuest;

/// Options about pages: where memory is passed none is sent.
pub(super) const EXCLUDES: [&str; 9] = [
    "from",
    "channels",
    "PostcopyArgs",
    "xbzrle_cache_size",
    "verify",
    "digest",
    "postcopy_preempt",
    "release_ram",
    "fallback",
];
/// The schemes behind which a process can have the memory.
const TO_A_PROCESS: [&str; 3] = ["unix", "tcp", "fd"];

/// Before any memory is passed: the migration can end at a process that has it. A client of the monitor gives an address
/// and options, too.
///
/// # Errors
/// [`Usage`].
pub(super) fn check(
    uri: &Address,
    settings: &SourceSettings,
    options: &ConnectionOptions,
) -> Result<(), Usage> {
    let scheme = uri.scheme();
    if !TO_A_PROCESS.contains(&scheme) {
        return Err(Usage(format!(
            "--cpr: {scheme}: can't be where the guest goes, since its memory would not be there; give the address of \
            the process that listens at the cpr channel (unix:, tcp: or fd:)"
        )));
    }
    let asked = [
        (settings.postcopy.is_some(), "postcopy"),
        (options.channels.count > 0, "page channels"),
        (options.delta_cache > 0, "an XBZRLE cache"),
        (settings.verify != Verify::Off, "--verify"),
    ];
    match asked.iter().find(|(is_asked, _)| *is_asked) {
        None => Ok(()),
        Some((_, what)) => Err(Usage(format!(
            "--cpr: no page is sent, so {what} can't be used with it; ask for one of the two"
        ))),
    }
}

/// Lets a process map the memory; returns when it listens for the migration.
///
/// # Errors
/// If a block can't be passed, or nobody took it.
pub(super) fn pass_memory(
    path: &Path,
    guest: &StoredGuest,
    options: &ConnectionOptions,
    stop: &Stop,
) -> Result<(), Box<dyn std::error::Error>> {
    let memory = guest.memory_to_pass()?;
    let sender = CprSender::connect(path, &options.stream, options.retry, stop)?;
    if let Some(custody) = guest.custody() {
        custody.pass();
    }
    Ok(sender.pass(&memory, stop)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use ramwire::session::{OnTimeout, PostcopyRule, PostcopySettings};
    use ramwire::stream::qemu::file::Configuration;

    use super::*;

    fn refused(uri: &str, change: impl FnOnce(&mut SourceSettings, &mut ConnectionOptions)) -> String {
        let mut settings =
            SourceSettings::new(Configuration { machine: "none".into(), ..Configuration::default() });
        let mut options = ConnectionOptions::default();
        change(&mut settings, &mut options);
        let checked = check(&uri.parse().unwrap(), &settings, &options);
        checked.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn a_guest_whose_memory_is_passed_goes_to_a_process() {
        for uri in ["unix:/run/main.sock", "tcp:127.0.0.1:4444", "fd:3"] {
            assert_eq!(refused(uri, |_, _| ()), "", "{uri}");
        }
        for uri in ["file:guest", "exec:cat", "mapped:guest", "rdma:10.0.0.7:4444", "auto:10.0.0.7:4444"] {
            assert!(refused(uri, |_, _| ()).contains("its memory would not be there"), "{uri}");
        }
    }

    #[test]
    fn options_about_pages_are_refused_wherever_they_come_from() {
        type Change = fn(&mut SourceSettings, &mut ConnectionOptions);
        let cases: [(Change, &str); 4] = [
            (
                |settings, _| {
                    settings.timeout = Some((Duration::from_secs(1), OnTimeout::Postcopy));
                    settings.postcopy = Some(PostcopySettings::new(PostcopyRule::OnCommand));
                },
                "postcopy",
            ),
            (|_, options| options.channels.count = 2, "page channels"),
            (|_, options| options.delta_cache = 1 << 20, "XBZRLE"),
            (|settings, _| settings.verify = Verify::Full, "--verify"),
        ];
        for (change, due) in cases {
            let text = refused("unix:/run/main.sock", change);
            assert!(text.contains(due) && text.contains("one of the two"), "{due}: {text}");
        }
    }
}
