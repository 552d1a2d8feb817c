//! The texts for a refusal of TLS, with the remedies.

use std::io;

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, OtherError};

use super::TlsError;
use super::clients::NotListed;
use crate::error::Remedy;

/// The text of an error.
pub(super) fn refused(error: &Error) -> TlsError {
    let (what, remedy) = match error {
        Error::InvalidCertificate(error) => of_certificate(error),
        Error::NoCertificatesPresented => (
            "the other end shows no certificate".to_owned(),
            Remedy::Advice("give it client-cert.pem and client-key.pem, or don't verify it"),
        ),
        Error::AlertReceived(alert) => of_alert(*alert),
        Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::MissingData(_))
        | Error::InvalidMessage(InvalidMessage::UnknownProtocolVersion | InvalidMessage::MessageTooLarge) => {
            ("the other end does not speak TLS, or has broken it".to_owned(), Remedy::AlignTls)
        }
        Error::PeerIncompatible(why) => (
            format!("the other end's TLS does not fit: {why:?}"),
            Remedy::Advice("let it take TLS 1.3 or 1.2 with AES-GCM or ChaCha20 and certificates"),
        ),
        Error::DecryptError => (
            "a TLS record was changed in transit, or encrypted with another key".to_owned(),
            Remedy::Advice("check the network between the ends"),
        ),
        other => (other.to_string(), Remedy::Advice("look at the other end's log")),
    };
    TlsError::Refused { what, remedy }
}

/// The connection ended in the middle of the handshake.
pub(super) fn cut_off() -> io::Error {
    let remedy =
        Remedy::Advice("see whether it has TLS switched on, and what its log says about the certificate");
    let what = "the other end closed the connection in the TLS handshake".to_owned();
    io::Error::new(io::ErrorKind::InvalidData, TlsError::Refused { what, remedy })
}

fn of_certificate(error: &CertificateError) -> (String, Remedy) {
    use CertificateError as E;
    let (what, remedy) = match error {
        E::Expired | E::ExpiredContext { .. } => ("has expired", "renew it, or set the clocks of both hosts"),
        E::NotValidYet | E::NotValidYetContext { .. } => {
            ("is not valid yet", "set the clocks of both hosts, or wait")
        }
        E::Revoked => ("was revoked", "issue another one (ca-crl.pem lists it)"),
        E::ExpiredRevocationList | E::ExpiredRevocationListContext { .. } => {
            ("can't be checked: the list of revoked ones has expired", "renew ca-crl.pem")
        }
        E::UnknownIssuer | E::BadSignature => {
            ("is of another authority", "give both ends the ca-cert.pem of the authority that issued it")
        }
        E::NotValidForNameContext { presented, .. } if presented.is_empty() => {
            return (
                "the other end's certificate names no host: it has no subjectAltName".to_owned(),
                Remedy::Advice("issue one with a subjectAltName (certtool: dns_name or ip_address)"),
            );
        }
        E::NotValidForNameContext { expected, presented } => {
            let expected = expected.to_str();
            let presented: Vec<_> = presented.iter().map(|name| bare(name)).collect();
            let presented = presented.join(", ");
            let what = format!("the other end's certificate is for {presented}, not for {expected}");
            return (what, Remedy::NameTlsHost);
        }
        E::Other(OtherError(why)) if why.is::<NotListed>() => {
            return (why.to_string(), Remedy::ListTlsClients);
        }
        E::NotValidForName => {
            return ("the other end's certificate is for another host".to_owned(), Remedy::NameTlsHost);
        }
        E::InvalidPurpose | E::InvalidPurposeContext { .. } => (
            "is for another purpose",
            "issue one for a TLS client at a source, for a TLS server at a destination",
        ),
        other => {
            let what = format!("the other end's certificate can't be used: {other:?}");
            return (what, Remedy::Advice("issue another one"));
        }
    };
    (format!("the other end's certificate {what}"), Remedy::Advice(remedy))
}

/// A name of a certificate, without the decoration that rustls adds: `DnsName("host")`.
fn bare(name: &str) -> &str {
    let inner = name.split_once('(').and_then(|(_, inner)| inner.strip_suffix(')'));
    inner.map_or(name, |inner| inner.trim_matches('"'))
}

fn of_alert(alert: AlertDescription) -> (String, Remedy) {
    use AlertDescription as A;
    let (what, remedy) = match alert {
        A::CertificateRequired => {
            ("it asks for a certificate", "put client-cert.pem and client-key.pem into the folder")
        }
        // GnuTLS, and so QEMU, sends this if a client has not sent a certificate.
        A::HandshakeFailure => (
            "no handshake with what this end offers",
            "put client-cert.pem and client-key.pem into the folder, if it verifies who comes; see its log",
        ),
        A::UnknownCA => (
            "this end's certificate is of an authority that it does not know",
            "give both ends the ca-cert.pem of the authority that issued it",
        ),
        A::CertificateExpired => {
            ("this end's certificate is not valid now", "renew it, or set the clocks of both hosts")
        }
        A::CertificateRevoked => ("this end's certificate was revoked", "issue another one"),
        A::BadCertificate | A::CertificateUnknown | A::UnsupportedCertificate => {
            ("this end's certificate can't be used", "look at the other end's log, and issue another one")
        }
        A::AccessDenied => ("this end may not come in", "see who may, at the other end"),
        other => {
            return (
                format!("the other end refused the TLS connection: {other:?}"),
                Remedy::Advice("look at its log"),
            );
        }
    };
    (format!("the other end refused the TLS connection: {what}"), Remedy::Advice(remedy))
}
