//! The command `ramwire`.

mod cli;

fn main() -> std::process::ExitCode {
    cli::run()
}
