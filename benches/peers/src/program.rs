//! The command `ramwire`, which some benches run.

use std::path::PathBuf;
use std::process::Command;

use crate::BenchError;

/// Which `ramwire` is measured.
#[derive(Clone, Debug, clap::Args)]
pub struct Program {
    /// The program ramwire; otherwise the one that lies beside this one
    #[arg(long = "ramwire", value_name = "PATH")]
    path: Option<PathBuf>,
}

impl Program {
    /// A call of the program.
    ///
    /// # Errors
    /// [`BenchError::Missing`] if there is none.
    pub fn command(&self) -> Result<Command, BenchError> {
        let path =
            self.path.clone().or_else(|| Some(std::env::current_exe().ok()?.with_file_name("ramwire")));
        match path.filter(|path| path.is_file()) {
            Some(path) => Ok(Command::new(path)),
            None => Err(BenchError::Missing {
                program: "ramwire".into(),
                remedy: "build it (cargo build --release), or name it with --ramwire".into(),
            }),
        }
    }
}
