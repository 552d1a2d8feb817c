//! The command line, and the exit status of a run.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use super::common::{Usage, failed_in};
use super::output::{self, note};
use super::signals;
use super::{bench, ctl, demo, devices, guardian, inspect, pager, receive, relay, report, send, serve};

/// Moves the RAM of a running virtual machine to another host, in QEMU's own migration stream.
#[derive(Debug, Parser)]
#[command(name = "ramwire", version, about, max_term_width = 100, after_long_help = EXIT_STATUS)]
pub(super) struct Cli {
    /// What to log to standard error: error, warn, info, debug, trace, or tracing's filter syntax
    #[arg(long, global = true, default_value = "error", value_name = "FILTER")]
    log: String,
    #[command(subcommand)]
    command: Command,
}

const EXIT_STATUS: &str = "EXIT STATUS:
    0  done
    2  bad usage
    3  failed; the guest is safe at the source
    4  cancelled; the guest is safe at the source
    5  in doubt: the guest was given away, or may have been, and no report came that it runs
    6  arrived, and not verified: pages differ from those that were sent

The status does not depend on the output: it is the same if the result can't be printed. `generate`, which does
nothing but print, has failed then.

The first SIGINT, SIGTERM or SIGHUP cancels, a second one exits without waiting. Under nohup SIGHUP is ignored.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Migrate a writing guest between two processes on this machine, and check every page
    Demo(demo::Args),
    #[command(hide = true)]
    DemoDestination(demo::DestinationArgs),
    /// Receive a guest from a QEMU or a ramwire and store it in a folder
    Receive(receive::Args),
    /// Forward a running guest's migration from one QEMU or ramwire to another
    Relay(relay::Args),
    /// Send a stored guest to a waiting QEMU or ramwire
    Send(send::Args),
    /// Watch and control a running migration through the monitor of a ramwire or a QEMU
    Ctl(ctl::Args),
    /// Serve the memory of Firecracker guests from a snapshot
    Pager(pager::Args),
    /// Serve the memory of a snapshot to pagers on other hosts
    Serve(serve::Args),
    /// Print the structure of a captured stream
    Inspect(inspect::Args),
    /// Draw the log of a run as an HTML page
    Report(report::Args),
    /// List this host's RDMA devices and whether a guest can be migrated over them
    Devices(devices::Args),
    /// Measure messages over RDMA, TCP and UNIX sockets, as perftest does
    Bench(bench::BenchArgs),
    /// Print shell completions or the man page
    Generate(Generate),
}

impl Command {
    /// Refuses options that don't go together, before anything is opened or made.
    fn check(&self) -> Result<(), (&'static str, Usage)> {
        let (command, checked) = match self {
            Self::Demo(args) => ("demo", args.check()),
            Self::Receive(args) => ("receive", args.check()),
            Self::Relay(args) => ("relay", args.check()),
            Self::Send(args) => ("send", args.check()),
            Self::Pager(args) => ("pager", args.check()),
            Self::Serve(args) => ("serve", args.check()),
            _ => return Ok(()),
        };
        checked.map_err(|usage| (command, usage))
    }

    /// Whoever reads the output of a migration expects one object, whatever becomes of it.
    fn is_json(&self) -> bool {
        match self {
            Self::Demo(args) => args.json,
            Self::Receive(args) => args.json,
            Self::Relay(args) => args.json,
            Self::Send(args) => args.json,
            _ => false,
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "EXAMPLES:
    ramwire generate bash > /usr/share/bash-completion/completions/ramwire
    ramwire generate man > /usr/share/man/man1/ramwire.1")]
struct Generate {
    /// bash, zsh, fish, elvish, powershell, or man
    what: What,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum What {
    Bash,
    Zsh,
    Fish,
    Elvish,
    Powershell,
    Man,
}

/// Result of a run of the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Done,
    Usage,
    Failed,
    Cancelled,
    InDoubt,
    NotVerified,
}

impl Exit {
    /// As a field of what `--json` prints.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Done => "completed",
            Self::Usage => "refused",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::InDoubt => "in-doubt",
            Self::NotVerified => "not-verified",
        }
    }

    /// The process's status.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Usage => 2,
            Self::Failed => 3,
            Self::Cancelled => 4,
            Self::InDoubt => 5,
            Self::NotVerified => 6,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// Parses the command line and executes it.
pub fn run() -> ExitCode {
    // Before anything allocates memory or starts a thread.
    if std::env::args_os().nth(1).is_some_and(|first| first == guardian::ARGUMENT) {
        return guardian::run();
    }
    let cli = Cli::parse();
    match tracing_subscriber::EnvFilter::try_new(&cli.log) {
        Ok(filter) => {
            let colours = io::stderr().is_terminal();
            let logs = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
            let logs = logs.with_writer(output::Logs);
            // The journal has time and level of its own.
            if output::is_journal() { logs.without_time().with_level(false).init() } else { logs.init() }
        }
        Err(error) => {
            note!("ramwire: --log {}: {error}; try --log debug", cli.log);
            return output::status(Exit::Usage);
        }
    }
    if let Err((command, usage)) = cli.command.check() {
        return output::status(failed_in(command, cli.command.is_json(), &usage));
    }
    signals::survive_faults_of_files();
    let exit = match cli.command {
        Command::Demo(args) => demo::run(&args),
        Command::DemoDestination(args) => demo::run_destination(&args),
        Command::Receive(args) => receive::run(&args),
        Command::Relay(args) => relay::run(&args),
        Command::Send(args) => send::run(&args),
        Command::Ctl(args) => ctl::run(&args),
        Command::Pager(args) => pager::run(&args),
        Command::Serve(args) => serve::run(&args),
        Command::Inspect(args) => inspect::run(&args),
        Command::Report(args) => report::run(&args),
        Command::Devices(args) => devices::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Generate(args) => generate(args.what),
    };
    output::status(exit)
}

fn generate(what: What) -> Exit {
    match generated(what).and_then(|text| output::product(&text)) {
        Ok(()) => Exit::Done,
        Err(error) => {
            note!("ramwire generate: standard output: {error}");
            Exit::Failed
        }
    }
}

/// Completions for a shell, or the man page: of the command, then of each subcommand with all its options.
fn generated(what: What) -> io::Result<Vec<u8>> {
    use clap_complete::Shell;
    let mut text = Vec::new();
    let shell = match what {
        What::Bash => Shell::Bash,
        What::Zsh => Shell::Zsh,
        What::Fish => Shell::Fish,
        What::Elvish => Shell::Elvish,
        What::Powershell => Shell::PowerShell,
        What::Man => {
            man_page(&mut text)?;
            return Ok(text);
        }
    };
    clap_complete::generate(shell, &mut Cli::command(), "ramwire", &mut text);
    Ok(text)
}

fn man_page(out: &mut Vec<u8>) -> io::Result<()> {
    let mut command = Cli::command();
    command.build();
    clap_mangen::Man::new(command.clone()).render(out)?;
    let shown = |command: &&clap::Command| !command.is_hide_set() && command.get_name() != "help";
    for subcommand in command.get_subcommands().filter(shown) {
        writeln!(out, ".SH \"ramwire {}\"", subcommand.get_name())?;
        let man = clap_mangen::Man::new(subcommand.clone());
        man.render_synopsis_section(out)?;
        man.render_description_section(out)?;
        man.render_options_section(out)?;
        if subcommand.get_after_help().is_some() || subcommand.get_after_long_help().is_some() {
            man.render_extra_section(out)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
    /// The words of a refusal, by the parser or by the check of what goes together; `None`: nothing is wrong.
    fn refused(line: &str) -> Option<String> {
        match Cli::try_parse_from(["ramwire"].into_iter().chain(line.split(' '))) {
            Err(error) => Some(error.to_string()),
            Ok(cli) => cli.command.check().err().map(|(_, usage)| usage.to_string()),
        }
    }

    #[test]
    fn options_without_effect_and_options_that_exclude_each_other_are_refused() {
        for (line, says) in [
            ("send tcp:h:1 --dir d --postcopy --postcopy-after command", "--qmp"),
            ("send tcp:h:1 --dir d --postcopy --verify full", "--verify"),
            ("send tcp:h:1 --dir d --timeout 1 --timeout-action postcopy --verify fast", "--verify"),
            ("send tcp:h:1 --dir d --max-postcopy-bandwidth 1M", "--postcopy"),
            ("send tcp:h:1 --dir d --active-channels 2", "--channels 2"),
            ("send tcp:h:1 --dir d --channels 2 --active-channels 3", "--channels 3"),
            ("send tcp:h:1 --dir d --queue-pairs 2", "--queue-pairs"),
            ("send unix:s --dir d --pin-all", "--pin-all"),
            ("send unix:s --dir d --cpr unix:c --release-ram", "--cpr"),
            ("send unix:s --dir d --cpr unix:c --postcopy-after 3", "--cpr"),
            ("demo --postcopy --postcopy-after command", "--qmp"),
            ("demo --max-postcopy-bandwidth 1M", "--postcopy"),
            ("demo --vcpu-dirty-limit 1M", "--dirty-limit"),
            ("demo --cpu-throttle-initial 30", "--auto-converge"),
            ("demo --cpu-throttle-increment 30 --dirty-limit", "--auto-converge"),
            ("demo --cpu-throttle-tailslow", "--auto-converge"),
            ("demo --max-cpu-throttle 30", "--auto-converge"),
            ("demo --queue-pairs 2 --transport tcp", "--queue-pairs"),
            ("demo --pin-all --transport unix", "--pin-all"),
            ("demo --snapshot a --base ./a", "one file"),
            ("demo --restore a --base b", "--base"),
            ("demo --snapshot a --lazy", "--lazy"),
            ("demo --same-host --base b", "--base"),
            ("demo --same-host --lazy", "--lazy"),
            ("demo --same-host --release-ram", "--release-ram"),
            ("relay --listen tcp:h:1 --connect tcp:h:2 --listen-compression zlib", "--listen-channels"),
            ("relay --listen tcp:h:1 --connect tcp:h:2 --active-channels 2", "--channels 2"),
            ("relay --listen tcp:h:1 --connect tcp:h:2 --queue-pairs 2", "--queue-pairs"),
            ("pager --listen unix:s --from vm.mem --tls-dir d", "--tls-dir"),
            ("pager --listen tcp:h:1 --from vm.mem", "unix:PATH"),
            ("serve --listen rdma:h:1 --from vm.mem", "tcp:HOST:PORT"),
            ("serve --listen file:x --from vm.mem", "tcp:HOST:PORT"),
            ("demo --metrics foo", "HOST:PORT"),
            ("demo --metrics 99999", "HOST:PORT"),
            ("send tcp:h:1 --dir d --metrics 127.0.0.1", "HOST:PORT"),
            ("bench latency --connect foo", "HOST:PORT"),
            ("bench latency --listen 127.0.0.1", "HOST:PORT"),
        ] {
            let words = refused(line);
            assert!(words.as_ref().is_some_and(|words| words.contains(says)), "{line}: {words:?}");
        }
        for line in [
            "send tcp:h:1 --dir d --reconnect 10 --channels 2",
            "receive tcp:h:1 --dir d --reconnect 10 --channels 2",
            "send tcp:h:1 --dir d --postcopy --reconnect 10 --channels 2",
            "send tcp:h:1 --dir d --qmp unix:q --postcopy --postcopy-after command",
            "send --dir d --qmp unix:q --max-postcopy-bandwidth 1M --active-channels 2 --queue-pairs 2",
            "send tcp:h:1 --dir d --timeout 1 --timeout-action postcopy --max-postcopy-bandwidth 1M",
            "send rdma:h:1 --dir d --queue-pairs 2 --return-path",
            "send auto:h:1 --dir d --pin-all",
            "receive tcp:h:1 --dir d --channels 2",
            "demo --timeout 1 --timeout-action postcopy",
            "demo --auto-converge --max-cpu-throttle 30",
            "demo --dirty-limit --vcpu-dirty-limit 1M",
            "demo --snapshot a --base b",
            "demo --restore a --lazy",
            "demo --metrics [::1]:0",
            "demo --metrics :9000",
            "demo --metrics localhost:9000",
            "bench latency --connect h:7000",
            "serve --listen fd:3 --from vm.mem",
            "relay --listen rdma:h:1 --connect tcp:h:2 --pin-all",
            "pager --listen unix:s --from tcp:h:1 --tls-dir d",
        ] {
            assert_eq!(refused(line), None, "{line}");
        }
    }

    /// Every visible subcommand and each of its long options is in each text.
    #[test]
    fn completions_and_man_page_have_every_subcommand_and_option() {
        let mut command = Cli::command();
        command.build();
        let shown = |command: &&clap::Command| !command.is_hide_set() && command.get_name() != "help";
        for what in What::value_variants() {
            // A man page escapes each hyphen.
            let text = String::from_utf8(generated(*what).unwrap()).unwrap().replace("\\-", "-");
            for subcommand in command.get_subcommands().filter(shown) {
                let name = subcommand.get_name();
                assert!(text.contains(name), "{what:?} lacks {name}");
                for option in subcommand.get_arguments().filter(|arg| !arg.is_hide_set()) {
                    let Some(long) = option.get_long() else { continue };
                    // fish writes `-l name` for `--name`.
                    let found = text.contains(&format!("--{long}")) || text.contains(&format!("-l {long}"));
                    assert!(found, "{what:?} lacks --{long} of {name}");
                }
            }
        }
        let man = String::from_utf8(generated(What::Man).unwrap()).unwrap();
        assert!(man.contains("EXIT STATUS") && man.contains(".SH \"ramwire receive\""), "{man}");
        assert!(!man.contains("demo-destination") && !man.contains("demo\\-destination"));
    }
}
