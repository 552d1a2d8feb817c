//! The certificate folder, in QEMU's layout, and the TLS settings made from it.

use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, UnbufferedClientConnection, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::clients::Listed;
use super::{TlsError, TlsOptions, TlsSession};

/// How an end makes TLS connections: certificates and settings, read once. Connections of an
/// [`Address`](crate::transport::Address) that has it use TLS.
#[derive(Clone, Debug)]
pub struct Tls(Arc<Role>);

#[derive(Debug)]
enum Role {
    Client { config: Arc<ClientConfig>, hostname: Option<String> },
    Server { config: Arc<ServerConfig> },
}

impl PartialEq for Tls {
    /// Equal only if it is the same object.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Tls {}

impl Hash for Tls {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

impl Tls {
    /// For a source, which is the client on every connection. If it has no certificate of its own, a destination that
    /// requires one refuses it.
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn of_source(options: &TlsOptions) -> Result<Self, TlsError> {
        Self::client(options, Arc::new(ring::default_provider()))
    }

    pub(super) fn client(options: &TlsOptions, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let folder = Folder(&options.dir);
        let mut verifier =
            WebPkiServerVerifier::builder_with_provider(folder.authorities()?, Arc::clone(&provider));
        if let Some(revoked) = folder.revoked()? {
            verifier =
                verifier.with_crls(revoked).allow_unknown_revocation_status().enforce_revocation_expiration();
        }
        let verifier = verifier.build().map_err(|error| folder.wrong(CA, error))?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| folder.wrong(CA, error))?
            .with_webpki_verifier(verifier);
        let mut config = match folder.identity("client")? {
            Some((chain, key)) => config
                .with_client_auth_cert(chain, key)
                .map_err(|error| folder.wrong("client-cert.pem", error))?,
            None => config.with_no_client_auth(),
        };
        // Each connection has its own full handshake, as with QEMU.
        config.resumption = Resumption::disabled();
        Ok(Self(Arc::new(Role::Client { config: Arc::new(config), hostname: options.hostname.clone() })))
    }

    /// For a destination, which is the server.
    ///
    /// # Errors
    /// [`TlsError::File`].
    pub fn of_destination(options: &TlsOptions) -> Result<Self, TlsError> {
        let folder = Folder(&options.dir);
        let provider = Arc::new(ring::default_provider());
        let config = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| folder.wrong(CA, error))?;
        let config = if options.verify_peer || !options.clients.is_empty() {
            let mut verifier = WebPkiClientVerifier::builder_with_provider(folder.authorities()?, provider);
            if let Some(revoked) = folder.revoked()? {
                verifier = verifier
                    .with_crls(revoked)
                    .allow_unknown_revocation_status()
                    .enforce_revocation_expiration();
            }
            let verifier = verifier.build().map_err(|error| folder.wrong(CA, error))?;
            config.with_client_cert_verifier(match options.clients.as_slice() {
                [] => verifier,
                names => Arc::new(Listed { verifier, names: names.to_vec() }),
            })
        } else {
            config.with_no_client_auth()
        };
        let Some((chain, key)) = folder.identity("server")? else {
            return Err(TlsError::File {
                path: folder.0.join("server-cert.pem"),
                what: "there is none; a destination needs it and server-key.pem".into(),
            });
        };
        let mut config =
            config.with_single_cert(chain, key).map_err(|error| folder.wrong("server-cert.pem", error))?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Self(Arc::new(Role::Server { config: Arc::new(config) })))
    }

    /// A connection that has not begun. `host`: that of the address to connect to.
    pub(in crate::transport) fn session(&self, host: &str) -> Result<TlsSession, TlsError> {
        let refused = |error: rustls::Error| super::refusal::refused(&error);
        match &*self.0 {
            Role::Client { config, hostname } => {
                let name = name_of(hostname.as_deref().unwrap_or(host))?;
                let connection = UnbufferedClientConnection::new(Arc::clone(config), name);
                Ok(TlsSession::of_client(connection.map_err(refused)?))
            }
            Role::Server { config } => {
                let connection = UnbufferedServerConnection::new(Arc::clone(config));
                Ok(TlsSession::of_server(connection.map_err(refused)?))
            }
        }
    }
}

/// The name that a certificate must be for. A link-local address is used without its interface.
fn name_of(host: &str) -> Result<ServerName<'static>, TlsError> {
    let plain = host.split_once('%').map_or(host, |(address, _zone)| address);
    ServerName::try_from(plain.to_owned()).map_err(|_| TlsError::NoName { name: host.to_owned() })
}

const CA: &str = "ca-cert.pem";

/// Where QEMU's tls-creds-psk has its keys.
const PSK: &str = "keys.psk";

struct Folder<'a>(&'a Path);

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Folder<'_> {
    fn wrong(&self, name: &str, error: impl std::fmt::Display) -> TlsError {
        TlsError::File { path: self.0.join(name), what: error.to_string() }
    }

    fn missing(path: PathBuf, what: &str) -> TlsError {
        TlsError::File { path, what: what.to_owned() }
    }

    fn authorities(&self) -> Result<Arc<RootCertStore>, TlsError> {
        let mut store = RootCertStore::empty();
        let found = self.certificates(CA)?;
        let found = found.ok_or_else(|| {
            let what = match self.0.join(PSK).exists() {
                // rustls has no cipher suites with pre-shared keys.
                true => {
                    "there is none, and the pre-shared keys in keys.psk are not used: only certificates are supported \
                     (tls-creds-x509 at a QEMU, not tls-creds-psk)"
                }
                false => "there is none; copy the authority's certificate there",
            };
            Self::missing(self.0.join(CA), what)
        })?;
        for certificate in found {
            store.add(certificate).map_err(|error| self.wrong(CA, error))?;
        }
        Ok(Arc::new(store))
    }

    fn revoked(&self) -> Result<Option<Vec<CertificateRevocationListDer<'static>>>, TlsError> {
        let name = "ca-crl.pem";
        read_all(&self.0.join(name)).map_err(|error| self.wrong(name, error))
    }

    fn certificates(&self, name: &str) -> Result<Option<Vec<CertificateDer<'static>>>, TlsError> {
        read_all(&self.0.join(name)).map_err(|error| self.wrong(name, error))
    }

    /// Certificate and key, or neither.
    fn identity(&self, end: &str) -> Result<Option<Identity>, TlsError> {
        let (cert, key) = (format!("{end}-cert.pem"), format!("{end}-key.pem"));
        let chain = self.certificates(&cert)?;
        let path = self.0.join(&key);
        let found = match PrivateKeyDer::from_pem_file(&path) {
            Ok(found) => Some(found),
            Err(error) if is_absent(&error) => None,
            Err(error) => return Err(self.wrong(&key, in_words(&error))),
        };
        match (chain, found) {
            (Some(chain), Some(key)) => Ok(Some((chain, key))),
            (None, None) => Ok(None),
            (Some(_), None) => Err(Self::missing(path, "there is none; the certificate needs its key")),
            (None, Some(_)) => {
                Err(Self::missing(self.0.join(cert), "there is none; the key needs its certificate"))
            }
        }
    }
}

/// All items of a kind in a file; `None` if there is no file.
fn read_all<T: PemObject>(path: &Path) -> Result<Option<Vec<T>>, String> {
    let found = match T::pem_file_iter(path) {
        Ok(items) => items.collect::<Result<Vec<_>, _>>(),
        Err(error) => Err(error),
    };
    match found {
        Ok(items) if items.is_empty() => Err(in_words(&pem::Error::NoItemsFound)),
        Ok(items) => Ok(Some(items)),
        Err(error) if is_absent(&error) => Ok(None),
        Err(error) => Err(in_words(&error)),
    }
}

fn is_absent(error: &pem::Error) -> bool {
    matches!(error, pem::Error::Io(error) if error.kind() == std::io::ErrorKind::NotFound)
}

fn in_words(error: &pem::Error) -> String {
    match error {
        pem::Error::Io(error) => format!("reading failed: {error}"),
        pem::Error::NoItemsFound => "it contains none; write it in the PEM format".into(),
        other => format!("it is not in the PEM form: {other:?}"),
    }
}
