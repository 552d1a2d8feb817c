//! Why there are no figures.

use std::io;
use std::path::PathBuf;

use ramwire::transport::{ChannelError, OpenError};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// A program to compare with was not found.
    #[error("{program} was not found; {remedy}")]
    Missing {
        /// The program.
        program: String,
        /// What would help.
        remedy: String,
    },
    /// The memory could not be allocated.
    #[error("{}; --ram is needed twice over in --memory-dir", path.display())]
    Memory {
        /// The file.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A contestant refused.
    #[error("{who} refused {what}: {answer}")]
    Refused {
        /// The contestant.
        who: String,
        /// What it was asked.
        what: String,
        /// Its answer.
        answer: String,
    },
    /// The memory that arrived differs from the memory that was sent.
    #[error("{who} moved other bytes than there were, from byte {at:#x} on; no figures of it count")]
    Differs {
        /// The contestant.
        who: String,
        /// First byte that differs.
        at: u64,
    },
    /// RDMA can't be used.
    #[error(transparent)]
    NoRdma(Box<dyn std::error::Error + Send + Sync>),
    /// A contestant that does not support the transport.
    #[error("{who} does not go by this transport; compare with {known}")]
    NotThisWay {
        /// The contestant.
        who: String,
        /// The contestants that support it.
        known: &'static str,
    },
    /// Private memory is the process's own.
    #[error("--memory huge is there with its process only: give --populated yes or no")]
    NotBacked,
    /// A signal arrived.
    #[error("cancelled")]
    Cancelled,
    /// A call failed.
    #[error("{who}: {doing}")]
    Io {
        /// The contestant.
        who: String,
        /// What it was doing.
        doing: &'static str,
        /// The answer.
        source: io::Error,
    },
    /// A connection could not be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A connection failed.
    #[error(transparent)]
    Channel(#[from] ChannelError),
}
