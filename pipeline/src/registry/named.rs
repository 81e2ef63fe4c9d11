//! Trust in certificate authorities that the user named, and in servers that show such a certificate as their own.
//!
//! `openssl req -x509` makes certificates that say of themselves that they are an authority's, and many a registry of one
//! machine shows one. webpki refuses an authority's certificate as a server's, where curl, skopeo and docker take it if it is
//! the very one that was named. So do we: whoever has its key could sign a certificate for any name, so that accepting it for
//! the names in it gives nothing away.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_name;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, DigitallySignedStruct, Error, SignatureScheme};
use rustls_platform_verifier::Verifier;

/// The system's verifier, which trusts the named authorities too, with that one exception.
#[derive(Debug)]
pub(super) struct NamedAuthorities {
    inner: Verifier,
    named: Vec<CertificateDer<'static>>,
}

impl NamedAuthorities {
    pub(super) fn new(
        named: Vec<CertificateDer<'static>>,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, Error> {
        let inner = Verifier::new_with_extra_roots(named.iter().cloned(), provider)?;
        Ok(Self { inner, named })
    }
}

impl ServerCertVerifier for NamedAuthorities {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        match self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now) {
            // webpki looks at the times of a certificate before its basic constraints, and at both before it looks for an
            // issuer (`check_issuer_independent_properties` in its verify_cert.rs, as of 0.103.17): with this error the
            // certificate is neither expired nor of the future. Names are only looked at after all that, so here.
            Err(error) if is_authority_as_server(&error) && self.named.contains(end_entity) => {
                verify_server_name(&ParsedCertificate::try_from(end_entity)?, server_name)?;
                Ok(ServerCertVerified::assertion())
            }
            verified => verified,
        }
    }

    // That the server has the certificate's key is asked in any case.
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, certificate, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

/// rustls has no name of its own for this error, and passes on webpki's.
fn is_authority_as_server(error: &Error) -> bool {
    let Error::InvalidCertificate(CertificateError::Other(other)) = error else { return false };
    matches!(other.0.downcast_ref(), Some(webpki::Error::CaUsedAsEndEntity))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls::pki_types::pem::PemObject as _;

    use super::*;

    /// `openssl req -x509 -subj /CN=localhost -newkey ec … -days 30 -addext subjectAltName=DNS:localhost`
    const PEM: &[u8] = b"-----BEGIN CERTIFICATE-----
MIIBkzCCATmgAwIBAgIUVug1CSI/XYD/JD19+i8CRF6BRFEwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MB4XDTI2MTEyNTE4MjAwNFoXDTI2MTIyNTE4
MjAwNFowFDESMBAGA1UEAwwJbG9jYWxob3N0MFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAElwYhhN4bvjsjcqjaYPhdFeeelO+aPMOEVzY+i4Ao2lEumyTg6dXathca
viJYua0G5j2hBPHdtT4jYOemvdIW1KNpMGcwHQYDVR0OBBYEFJa/VXO1RkcfJ16t
iOJp32efh1a7MB8GA1UdIwQYMBaAFJa/VXO1RkcfJ16tiOJp32efh1a7MA8GA1Ud
EwEB/wQFMAMBAf8wFAYDVR0RBA0wC4IJbG9jYWxob3N0MAoGCCqGSM49BAMCA0gA
MEUCIQD0D31lIH0eOCEyXvhnVBNpkCDitCaeEWy0Ztqp1FPwtwIgENsxTQwMkmNo
AaWD5b5QpIC701AHPZZeW4GCHRAxrTc=
-----END CERTIFICATE-----";
    const FROM: u64 = 1_795_630_804;
    const DAY: u64 = 24 * 60 * 60;

    fn verify(named: &[CertificateDer<'static>], name: &str, at: u64) -> Result<(), Error> {
        let shown = CertificateDer::from_pem_slice(PEM).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = NamedAuthorities::new(named.to_vec(), provider)?;
        let name = ServerName::try_from(name).unwrap();
        let now = UnixTime::since_unix_epoch(Duration::from_secs(at));
        verifier.verify_server_cert(&shown, &[], &name, &[], now).map(|_| ())
    }

    #[test]
    fn a_named_certificate_is_a_servers_for_its_names_and_its_time() {
        let named = [CertificateDer::from_pem_slice(PEM).unwrap()];
        verify(&named, "localhost", FROM + DAY).unwrap();
        let refused = |name, at| match verify(&named, name, at).unwrap_err() {
            Error::InvalidCertificate(why) => why,
            error => panic!("{error}"),
        };
        let name = refused("example.com", FROM + DAY);
        assert!(matches!(name, CertificateError::NotValidForNameContext { .. }), "{name}");
        let early = refused("localhost", FROM - DAY);
        assert!(matches!(early, CertificateError::NotValidYetContext { .. }), "{early}");
        let late = refused("localhost", FROM + 31 * DAY);
        assert!(matches!(late, CertificateError::ExpiredContext { .. }), "{late}");
    }
}
