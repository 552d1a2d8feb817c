//! The command's text for an error: with its causes, and with the options for its remedy.

use std::error::Error;

use ramwire::error::{Chain, Remedy};
use ramwire::session;
use ramwire::stream::DecodeError;
use ramwire::sys::MappingError;
use ramwire::transport::{ChannelError, MoveError, OpenError};

/// The options of this command for a remedy.
pub(super) fn options(remedy: Remedy) -> &'static [&'static str] {
    match remedy {
        Remedy::RaiseStallTimeout => &["--stall-timeout"],
        Remedy::RaiseFinishTimeout => &["--finish-timeout"],
        Remedy::RaiseGreetingTimeout => &["--greeting-timeout"],
        Remedy::RaiseRamLimit => &["--max-ram"],
        Remedy::NamePeer => &["--peer qemu-7.2, qemu-10.0 or ramwire"],
        Remedy::AskForChannels | Remedy::AlignChannels | Remedy::DropChannels => &["--channels"],
        Remedy::DropDeltasOrChannels => &["--xbzrle-cache-size", "--channels"],
        Remedy::CopyPagesOrAskForChannels => &["--send-pages", "--channels"],
        Remedy::CopyPagesOrDropCompression => &["--send-pages", "--compression"],
        Remedy::AllowPeers => &["--allow CIDR"],
        Remedy::NameTlsHost => &["--tls-hostname"],
        Remedy::AlignTls => &["--tls-dir"],
        Remedy::AlignUrgent => &["--postcopy-preempt"],
        Remedy::ListTlsClients => &["--tls-authz"],
        // Each command reports its own (see `converge::print_remedies`).
        Remedy::HelpConvergence => &[],
        // Advice has no option; remedies that the library adds later have no option yet.
        _ => &[],
    }
}

/// ` (--option, --option)`, or nothing.
pub(super) fn hint(remedy: Option<Remedy>) -> String {
    match remedy.map(options) {
        None | Some([]) => String::new(),
        Some(options) => format!(" ({})", options.join(", ")),
    }
}

/// The remedy of an error or of one of its causes.
fn remedy_of(error: &(dyn Error + 'static)) -> Option<Remedy> {
    // An I/O error wraps the error inside, which is not one of its causes.
    if let Some(inside) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
        return remedy_of(inside);
    }
    let own = None
        .or_else(|| error.downcast_ref::<session::Error>().and_then(session::Error::remedy))
        .or_else(|| error.downcast_ref::<OpenError>().and_then(OpenError::remedy))
        .or_else(|| error.downcast_ref::<ChannelError>().and_then(ChannelError::remedy))
        .or_else(|| error.downcast_ref::<MoveError>().and_then(MoveError::remedy))
        .or_else(|| error.downcast_ref::<DecodeError>().and_then(DecodeError::remedy));
    own.or_else(|| remedy_of(error.source()?))
}

/// The remedy for a limit of this process that the kernel's error names, if the errors themselves have no remedy.
fn limit_in(error: &(dyn Error + 'static)) -> Option<&'static str> {
    if error.is::<MappingError>() {
        return None;
    }
    limit_of(error).or_else(|| limit_in(error.source()?))
}

/// The remedy for an error of the kernel.
fn limit_of(error: &(dyn Error + 'static)) -> Option<&'static str> {
    match error.downcast_ref::<std::io::Error>()?.raw_os_error()? {
        libc::EFBIG => Some("raise the limit of file sizes (ulimit -f)"),
        libc::EMFILE => Some("raise the limit of open files (ulimit -n)"),
        libc::ENFILE => Some("too many files are open on this host; raise fs.file-max"),
        libc::EAGAIN => Some("raise the limit of processes and threads (ulimit -u, pids.max of the cgroup)"),
        _ => None,
    }
}

/// An error with its causes and the options that help.
pub(super) fn in_words(error: &(dyn Error + 'static)) -> String {
    let limit = limit_in(error).map(|remedy| format!("; {remedy}")).unwrap_or_default();
    format!("{}{limit}{}", Chain(error), hint(remedy_of(error)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_error_names_the_options_that_help_wherever_its_remedy_lies() {
        let stalled = ChannelError::Stalled {
            peer: "tcp:there:1".into(),
            doing: "sending pages",
            after: Duration::from_secs(2),
        };
        let text = in_words(&session::Error::Channel(stalled));
        assert!(text.contains("raise the stall timeout") && text.ends_with(" (--stall-timeout)"), "{text}");
        let unknown = std::io::Error::other(session::Error::from(MoveError::UnknownStyle));
        assert!(in_words(&unknown).ends_with("(--peer qemu-7.2, qemu-10.0 or ramwire)"));
        assert_eq!(in_words(&std::io::Error::other("no")), "no");
    }

    /// Every option that a remedy names is one of the command's.
    #[test]
    fn every_option_of_a_remedy_exists() {
        let command = <crate::cli::args::Cli as clap::CommandFactory>::command();
        let all: Vec<String> = command
            .get_subcommands()
            .flat_map(clap::Command::get_arguments)
            .filter_map(|argument| Some(format!("--{}", argument.get_long()?)))
            .collect();
        for remedy in [
            Remedy::RaiseStallTimeout,
            Remedy::RaiseFinishTimeout,
            Remedy::RaiseGreetingTimeout,
            Remedy::RaiseRamLimit,
            Remedy::NamePeer,
            Remedy::AskForChannels,
            Remedy::AlignChannels,
            Remedy::DropDeltasOrChannels,
            Remedy::DropChannels,
            Remedy::CopyPagesOrAskForChannels,
            Remedy::CopyPagesOrDropCompression,
            Remedy::AllowPeers,
            Remedy::NameTlsHost,
            Remedy::AlignTls,
            Remedy::ListTlsClients,
        ] {
            assert!(!options(remedy).is_empty(), "{remedy:?}");
            for option in options(remedy) {
                let name = option.split(' ').next().unwrap_or_default().to_owned();
                assert!(all.contains(&name), "{name}");
            }
        }
    }
}
