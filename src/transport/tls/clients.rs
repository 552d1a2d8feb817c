//! Which clients may connect, by the names in their certificates.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::HandshakeSignatureValid;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, SignatureScheme,
};
use webpki::EndEntityCert;

/// Tags of DER (X.690).
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT: u8 = 0x06;
/// Types of strings that are UTF-8 or a subset: UTF8String, PrintableString, IA5String.
const STRINGS: [u8; 3] = [0x0c, 0x13, 0x16];
/// id-at-commonName (X.520), 2.5.4.3.
const COMMON_NAME: [u8; 3] = [0x55, 0x04, 0x03];

/// Accepts a certificate that another verifier accepts, if one of its names is listed.
#[derive(Debug)]
pub(super) struct Listed {
    pub(super) verifier: Arc<dyn ClientCertVerifier>,
    pub(super) names: Vec<String>,
}

/// None of a certificate's names is listed.
#[derive(Debug)]
pub(super) struct NotListed(Vec<String>);

impl fmt::Display for NotListed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the other end's certificate names ")?;
        match self.0.as_slice() {
            [] => f.write_str("nobody")?,
            // The content of a certificate is only printed as text.
            names => {
                let names: Vec<_> = names.iter().map(|name| format!("`{}`", name.escape_debug())).collect();
                f.write_str(&names.join(", "))?;
            }
        }
        f.write_str(", and only listed clients may come in")
    }
}

impl std::error::Error for NotListed {}

impl ClientCertVerifier for Listed {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.verifier.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.verifier.verify_client_cert(end_entity, intermediates, now)?;
        let names = names_of(end_entity);
        if names.iter().any(|name| self.names.contains(name)) {
            return Ok(verified);
        }
        Err(Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(NotListed(names))))))
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }
}

/// The common names of the subject and the DNS names; empty for a certificate that can't be parsed.
fn names_of(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok(read) = EndEntityCert::try_from(certificate) else { return Vec::new() };
    let mut names = common_names(read.subject());
    names.extend(read.valid_dns_names().map(str::to_owned));
    names
}

/// The common names in a subject, which is given without its outermost tag: sets of pairs of a type and a value.
fn common_names(mut subject: &[u8]) -> Vec<String> {
    let mut names = Vec::new();
    while let Some((SET, mut set)) = next(&mut subject) {
        while let Some((SEQUENCE, mut pair)) = next(&mut set) {
            if next(&mut pair) == Some((OBJECT, &COMMON_NAME[..]))
                && let Some((tag, value)) = next(&mut pair)
                && STRINGS.contains(&tag)
                && let Ok(name) = str::from_utf8(value)
            {
                names.push(name.to_owned());
            }
        }
    }
    names
}

/// The next element of `rest`, its tag and contents. `None` at the end, and for one that is truncated or longer than 64
/// KiB.
fn next<'a>(rest: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let (tag, behind) = rest.split_first()?;
    let (first, behind) = behind.split_first()?;
    let (length, behind) = match (first, behind) {
        (length @ ..=0x7f, behind) => (usize::from(*length), behind),
        (0x81, [length, behind @ ..]) => (usize::from(*length), behind),
        (0x82, [high, low, behind @ ..]) => (usize::from(u16::from_be_bytes([*high, *low])), behind),
        _ => return None,
    };
    let (contents, behind) = behind.split_at_checked(length)?;
    *rest = behind;
    Some((*tag, contents))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C=DE, CN=a + O=b, CN=`c` 130 times.
    fn subject() -> Vec<u8> {
        let mut subject = vec![0x31, 11, 0x30, 9, 6, 3, 0x55, 4, 6, 0x13, 2, b'D', b'E'];
        subject.extend([0x31, 20, 0x30, 8, 6, 3, 0x55, 4, 3, 0x0c, 1, b'a']);
        subject.extend([0x30, 8, 6, 3, 0x55, 4, 10, 0x0c, 1, b'b']);
        subject.extend([0x31, 0x81, 141, 0x30, 0x81, 138, 6, 3, 0x55, 4, 3, 0x16, 0x81, 130]);
        subject.extend([b'c'; 130]);
        subject
    }

    #[test]
    fn common_names_are_found_wherever_they_stand() {
        assert_eq!(common_names(&subject()), ["a".to_owned(), "c".repeat(130)]);
    }

    #[test]
    fn a_subject_that_is_cut_short_has_fewer_names_and_no_others() {
        let all = common_names(&subject());
        for end in 0..subject().len() {
            let found = common_names(&subject()[..end]);
            assert!(found.len() < all.len() && all.starts_with(&found), "{end}: {found:?}");
        }
    }

    #[test]
    fn what_a_certificate_says_can_not_write_to_the_terminal() {
        let text = NotListed(vec!["\x1b[2J\n".into()]).to_string();
        assert!(text.contains(r"`\u{1b}[2J\n`"), "{text}");
        assert!(NotListed(Vec::new()).to_string().contains("names nobody"));
    }
}
