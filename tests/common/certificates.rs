//! Certificates of an authority that exists for one test.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber, date_time_ymd,
};

/// The authority that issues them.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// Properties of a certificate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Hosts it is for; none: it has no subjectAltName.
    pub(crate) names: &'static [&'static str],
    /// The years of its validity.
    pub(crate) years: (i32, i32),
    pub(crate) serial: u64,
}

impl Wanted {
    /// For this machine, now.
    pub(crate) const GOOD: Self =
        Self { names: &["localhost", "127.0.0.1", "::1"], years: (2020, 2200), serial: 1 };
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        (params.not_before, params.not_after) = (date_time_ymd(2020, 1, 1), date_time_ymd(2200, 1, 1));
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// Certificate and key of an end, as `client-cert.pem` and `client-key.pem`.
    pub(crate) fn issue(&self, dir: &Path, end: &str, wanted: Wanted) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = wanted.names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, end);
        params.serial_number = Some(SerialNumber::from(wanted.serial));
        let (from, to) = wanted.years;
        (params.not_before, params.not_after) = (date_time_ymd(from, 1, 1), date_time_ymd(to, 1, 1));
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![match end {
            "server" => ExtendedKeyUsagePurpose::ServerAuth,
            _ => ExtendedKeyUsagePurpose::ClientAuth,
        }];
        let issued = params.signed_by(&key, &self.issuer).unwrap();
        fs::write(dir.join(format!("{end}-cert.pem")), issued.pem()).unwrap();
        fs::write(dir.join(format!("{end}-key.pem")), key.serialize_pem()).unwrap();
    }

    /// A folder with good certificates of both ends.
    pub(crate) fn folder(&self, dir: PathBuf) -> PathBuf {
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("ca-cert.pem"), &self.pem).unwrap();
        self.issue(&dir, "server", Wanted::GOOD);
        self.issue(&dir, "client", Wanted { serial: 2, ..Wanted::GOOD });
        dir
    }

    /// Writes a list of revoked certificates into a folder.
    pub(crate) fn revoke(&self, dir: &Path, serials: &[u64]) {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: date_time_ymd(2021, 1, 1),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: date_time_ymd(2021, 1, 1),
            next_update: date_time_ymd(2200, 1, 1),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        fs::write(dir.join("ca-crl.pem"), list.signed_by(&self.issuer).unwrap().pem().unwrap()).unwrap();
    }
}
