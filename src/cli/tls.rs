//! Options of encrypted connections.

use std::ffi::OsString;
use std::path::PathBuf;

use ramwire::transport::{Address, Tls, TlsOptions};

use super::common::Usage;
use super::output::note;

/// Of a command that connects.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SourceTlsArgs {
    /// Encrypt all connections by TLS with the certificates in this folder, laid out as QEMU's tls-creds-x509: ca-cert.pem,
    /// client-cert.pem, client-key.pem, and ca-crl.pem if there is one. For tcp:, unix:, rdma: and auto:. By RDMA, to another
    /// ramwire only, the pages themselves are not encrypted
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// With --tls-dir: the host name or address that the destination's certificate must be for, if not that of the URI
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    tls_hostname: Option<String>,
    /// Refuse an address by which RAM could travel over a network unencrypted. Without TLS only unix:, files, and tcp:
    /// on the loopback are accepted
    #[arg(long)]
    require_tls: bool,
}

impl SourceTlsArgs {
    /// TLS is requested.
    pub(super) fn is_given(&self) -> bool {
        self.tls_dir.is_some()
    }

    /// The address with the configured TLS settings.
    pub(super) fn at(&self, address: &Address) -> Result<Address, Box<dyn std::error::Error>> {
        let Some(dir) = &self.tls_dir else { return Ok(plain(address, self.require_tls, "--tls-dir")?) };
        let mut options = TlsOptions::in_dir(dir);
        options.hostname = self.tls_hostname.clone();
        Ok(encrypted(address.clone().with_tls(Tls::of_source(&options)?), self.require_tls)?)
    }
}

/// Of a command that listens.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct DestinationTlsArgs {
    /// Accept only connections that are encrypted by TLS, with the certificates in this folder, laid out as QEMU's
    /// tls-creds-x509: ca-cert.pem, server-cert.pem, server-key.pem, and ca-crl.pem if there is one. For tcp:, unix:, rdma:
    /// and auto:. By RDMA, from another ramwire only, the pages themselves are not encrypted
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
    /// With --tls-dir: accept sources without a certificate (QEMU: verify-peer=off)
    #[arg(long, requires = "tls_dir", conflicts_with = "tls_authz")]
    tls_any_peer: bool,
    /// With --tls-dir: accept only sources whose certificate has this common name or DNS name; repeat for more
    #[arg(long, value_name = "NAME", requires = "tls_dir")]
    tls_authz: Vec<String>,
    /// Refuse an address by which RAM could travel over a network unencrypted. Without TLS only unix:, files, and tcp:
    /// on the loopback are accepted
    #[arg(long)]
    require_tls: bool,
}

impl DestinationTlsArgs {
    /// The address to listen on, with the configured TLS settings.
    pub(super) fn at(&self, address: &Address) -> Result<Address, Box<dyn std::error::Error>> {
        let Some(dir) = &self.tls_dir else { return Ok(plain(address, self.require_tls, "--tls-dir")?) };
        let mut options = TlsOptions::in_dir(dir);
        options.verify_peer = !self.tls_any_peer;
        options.clients.clone_from(&self.tls_authz);
        Ok(encrypted(address.clone().with_tls(Tls::of_destination(&options)?), self.require_tls)?)
    }
}

/// Of the listening side of a command that also connects.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct ListenTlsArgs {
    /// Accept only a source whose connections are encrypted by TLS, with the certificates in this folder: as --tls-dir, with
    /// server-cert.pem and server-key.pem
    #[arg(long, value_name = "DIR")]
    listen_tls_dir: Option<PathBuf>,
    /// With --listen-tls-dir: accept a source without a certificate (QEMU: verify-peer=off)
    #[arg(long, requires = "listen_tls_dir", conflicts_with = "listen_tls_authz")]
    listen_tls_any_peer: bool,
    /// With --listen-tls-dir: accept only sources whose certificate has this common name or DNS name; repeat for more
    #[arg(long, value_name = "NAME", requires = "listen_tls_dir")]
    listen_tls_authz: Vec<String>,
}

impl ListenTlsArgs {
    /// The address to listen on, with the configured TLS settings; the other side's options have `--require-tls`.
    pub(super) fn at(
        &self,
        address: &Address,
        other: &SourceTlsArgs,
    ) -> Result<Address, Box<dyn std::error::Error>> {
        let require_tls = other.require_tls;
        let Some(dir) = &self.listen_tls_dir else {
            return Ok(plain(address, require_tls, "--listen-tls-dir")?);
        };
        let mut options = TlsOptions::in_dir(dir);
        options.verify_peer = !self.listen_tls_any_peer;
        options.clients.clone_from(&self.listen_tls_authz);
        Ok(encrypted(address.clone().with_tls(Tls::of_destination(&options)?), require_tls)?)
    }
}

/// Of a command that has both ends on this host.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct OwnTlsArgs {
    /// Encrypt all connections by TLS with the certificates in this folder, which has those of both ends: server-cert.pem and
    /// client-cert.pem with their keys, ca-cert.pem, and ca-crl.pem if there is one. The server's is for localhost and
    /// 127.0.0.1
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,
}

impl OwnTlsArgs {
    /// TLS is requested.
    pub(super) fn is_given(&self) -> bool {
        self.tls_dir.is_some()
    }

    /// The address to connect to, with the configured TLS settings.
    pub(super) fn of_source(&self, address: Address) -> Result<Address, Box<dyn std::error::Error>> {
        let Some(dir) = &self.tls_dir else { return Ok(address) };
        let mut options = TlsOptions::in_dir(dir);
        // A UNIX socket has no host, and an RDMA device has another address than the certificate.
        options.hostname = (address.scheme() != "tcp").then(|| "localhost".to_owned());
        Ok(address.with_tls(Tls::of_source(&options)?))
    }

    /// The address to listen on, with the configured TLS settings.
    pub(super) fn of_destination(&self, address: &Address) -> Result<Address, Box<dyn std::error::Error>> {
        let Some(dir) = &self.tls_dir else { return Ok(address.clone()) };
        Ok(address.clone().with_tls(Tls::of_destination(&TlsOptions::in_dir(dir))?))
    }

    /// The option for another process.
    pub(super) fn argument(&self) -> Option<OsString> {
        let mut argument = OsString::from("--tls-dir=");
        argument.push(self.tls_dir.as_ref()?);
        Some(argument)
    }
}

/// The address without TLS, unless this is refused. `option`: the one that encrypts it.
fn plain(address: &Address, require_tls: bool, option: &str) -> Result<Address, Usage> {
    // Of any other scheme it is unknown where its bytes lead, as those of a descriptor or a command.
    let is_known = matches!(address.scheme(), "tcp" | "rdma" | "auto" | "unix" | "file" | "mapped");
    let may_leave = address.is_in_clear() || !is_known;
    if require_tls && may_leave {
        let remedy = match address.scheme() {
            "tcp" => format!("give {option} DIR"),
            _ => format!("give a tcp: or unix: address, and {option} DIR"),
        };
        return Err(Usage(format!(
            "{address}: RAM could travel unencrypted, and --require-tls is given; {remedy}"
        )));
    }
    Ok(address.clone())
}

/// The address with TLS, unless this does not encrypt RAM and is refused.
fn encrypted(address: Address, require_tls: bool) -> Result<Address, Usage> {
    if require_tls && matches!(address.scheme(), "rdma" | "auto") {
        return Err(Usage(format!(
            "{address}: by RDMA the pages of guest RAM travel unencrypted even with TLS, and --require-tls is given; give \
             a tcp: or unix: address"
        )));
    }
    Ok(address)
}

/// Warns once that data sent to this address can be read on the network.
pub(super) fn warn_if_unencrypted(command: &str, address: &Address, remedy: &str) {
    if !address.is_in_clear() {
        return;
    }
    match address.tls() {
        None => {
            note!("ramwire {command}: {address}: guest RAM travels unencrypted and unauthenticated; {remedy}")
        }
        Some(_) => {
            note!(
                "ramwire {command}: {address}: by RDMA the pages of guest RAM travel unencrypted, and only they"
            );
        }
    }
}
