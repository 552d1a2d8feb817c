//! TLS for byte streams, as QEMU does it with `tls-creds-x509`: the same folder, the source is the client on every
//! connection, and each connection has a handshake of its own.
//!
//! This module decides what is encrypted when; `stream::secured` reads and writes the descriptor.

#[cfg(not(feature = "tls"))]
mod absent;
#[cfg(feature = "tls")]
mod clients;
#[cfg(feature = "tls")]
mod credentials;
mod error;
#[cfg(feature = "tls")]
mod records;
#[cfg(feature = "tls")]
mod refusal;
#[cfg(feature = "tls")]
mod session;
#[cfg(all(test, feature = "tls"))]
pub(super) mod tests;

use std::path::PathBuf;

#[cfg(not(feature = "tls"))]
pub use absent::Tls;
#[cfg(not(feature = "tls"))]
pub(in crate::transport) use absent::TlsSession;
#[cfg(feature = "tls")]
pub use credentials::Tls;
pub use error::TlsError;
#[cfg(feature = "tls")]
pub(in crate::transport) use session::TlsSession;

/// Where an end finds its certificates, and what it requires of its peer.
///
/// The folder is QEMU's (`tls-creds-x509,dir=`): `ca-cert.pem`; `ca-crl.pem` if there is a list of revoked
/// certificates; `server-cert.pem` and `server-key.pem` at a destination; `client-cert.pem` and `client-key.pem` at a
/// source whose destination requires a certificate.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TlsOptions {
    /// The folder.
    pub dir: PathBuf,
    /// At a source: the name or address that the destination's certificate must be for. `None`: the host of its address.
    pub hostname: Option<String>,
    /// At a destination: a source must show a certificate of the same authority (QEMU: `verify-peer`).
    pub verify_peer: bool,
    /// At a destination: names of the sources that may connect, each a common name or a DNS name of their certificates,
    /// compared exactly. Empty: every source with a certificate of the authority. Otherwise a certificate is required
    /// even without `verify_peer`.
    pub clients: Vec<String>,
}

impl TlsOptions {
    /// The certificates in `dir`; a source must show one.
    pub fn in_dir(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), hostname: None, verify_peer: true, clients: Vec::new() }
    }
}
