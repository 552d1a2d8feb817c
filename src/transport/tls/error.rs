//! Why there is no TLS connection, and the remedy.

use std::path::PathBuf;

use crate::error::Remedy;

/// Why there is no TLS connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The program was built without it.
    #[error("this ramwire was built without the `tls` feature")]
    NotBuilt,
    /// A file of the folder can't be used.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and the remedy.
        what: String,
    },
    /// There is no name that the destination's certificate could be for.
    #[error("{name:?} is no name that a certificate can be for; {}", Remedy::NameTlsHost)]
    NoName {
        /// The host of the address; empty for a path.
        name: String,
    },
    /// One of the ends refused the handshake, or a later message.
    #[error("{what}; {remedy}")]
    Refused {
        /// What was refused, and by which end.
        what: String,
        /// What would help.
        remedy: Remedy,
    },
}

impl TlsError {
    /// The remedy, if a setting helps.
    pub fn remedy(&self) -> Option<Remedy> {
        match self {
            Self::NoName { .. } => Some(Remedy::NameTlsHost),
            Self::Refused { remedy, .. } => Some(*remedy),
            Self::NotBuilt | Self::File { .. } => None,
        }
    }
}
