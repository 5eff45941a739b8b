//! TLS of the connections that read a log, by the modes of libpq.

use std::{path::PathBuf, sync::Arc};

use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::config::{Tls, TlsMode};

/// What went wrong is told in words.
pub async fn handshake(socket: TcpStream, host: &str, tls: &Tls) -> Result<TlsStream<TcpStream>, String> {
    let name = ServerName::try_from(host.to_owned()).map_err(|error| error.to_string())?;
    let config = client_config(tls).await?;
    TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(|error| error.to_string())
}

/// The meaning of the modes is sqlx's, and so are the roots, except that a CA file replaces them.
async fn client_config(tls: &Tls) -> Result<ClientConfig, String> {
    let failed = |error: rustls::Error| error.to_string();
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(failed)?;
    let chain = match tls.mode {
        TlsMode::VerifyCa | TlsMode::VerifyFull => {
            let mut roots = RootCertStore::empty();
            match &tls.ca_file {
                Some(file) => {
                    for certificate in certificates(file).await? {
                        let added = roots.add(certificate);
                        added.map_err(|error| format!("{}: {error}", file.display()))?;
                    }
                }
                None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            }
            let chain = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build();
            Some(chain.map_err(|error| error.to_string())?)
        }
        TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => None,
    };
    let builder = match chain {
        Some(chain) if tls.mode == TlsMode::VerifyFull => builder.with_webpki_verifier(chain),
        chain => builder.dangerous().with_custom_certificate_verifier(Arc::new(Lenient { chain, provider })),
    };
    match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => {
            let pem = read(key).await?;
            let key =
                PrivateKeyDer::from_pem_slice(&pem).map_err(|error| format!("{}: {error}", key.display()))?;
            builder.with_client_auth_cert(certificates(cert).await?, key).map_err(failed)
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err("a client certificate and its key go together".to_owned()),
    }
}

async fn read(file: &PathBuf) -> Result<Vec<u8>, String> {
    tokio::fs::read(file).await.map_err(|error| format!("{}: {error}", file.display()))
}

async fn certificates(file: &PathBuf) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(file).await?).collect();
    match found {
        Ok(found) if found.is_empty() => Err(format!("{}: no certificate in it", file.display())),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("{}: {error}", file.display())),
    }
}

/// Verifies the chain, but not the name; or nothing, without a chain.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is looked at last, after the chain was found good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
