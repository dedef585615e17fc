//! Why connecting to a server failed, told apart as far as the user has to do different things about it.

use std::{error::Error, io, iter::successors};

use jiff::Timestamp;
use reqwest::Url;
use rustls::{CertificateError, InvalidMessage, pki_types::UnixTime};

/// Why connecting failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ConnectionFailure {
    /// Nothing listens on the port.
    Refused,
    UnknownHost,
    TimedOut,
    /// No trusted CA signed the certificate.
    UnknownIssuer,
    /// The certificate is for other names.
    WrongName,
    /// The certificate has expired.
    Expired,
    /// The certificate is not valid yet.
    NotYetValid,
    /// The certificate is invalid in another way.
    BadCertificate,
    /// The server speaks plain HTTP where HTTPS was expected.
    PlainHttp,
    /// The server speaks HTTPS where plain HTTP was expected.
    Https,
    /// Anything else, such as a connection that was cut.
    Other,
}

impl ConnectionFailure {
    /// Whether a retry may succeed soon.
    #[must_use]
    pub const fn is_transient(self) -> bool {
        matches!(self, Self::Refused | Self::UnknownHost | Self::TimedOut | Self::Other)
    }
}

/// The kind of a failure, and the reason as the user reads it.
pub(crate) fn describe(server: &Url, error: &reqwest::Error) -> (ConnectionFailure, String) {
    if error.is_timeout() {
        return (ConnectionFailure::TimedOut, "timed out".to_owned());
    }
    let host = server.host_str().unwrap_or_default();
    let mut innermost = error.to_string();
    for cause in causes(error) {
        if let Some(error) = cause.downcast_ref::<rustls::Error>()
            && let Some(known) = tls_failure(host, error)
        {
            return known;
        }
        innermost = cause.to_string();
        // The HTTP client does not export the types of these two errors.
        if innermost.starts_with("dns error") {
            return (ConnectionFailure::UnknownHost, format!("the name {host} cannot be resolved"));
        }
        if server.scheme() == "http" && innermost.starts_with("invalid HTTP") {
            return (ConnectionFailure::Https, "it does not speak plain HTTP; perhaps it speaks HTTPS".to_owned());
        }
        let kind = cause.downcast_ref::<io::Error>().map(io::Error::kind);
        if kind == Some(io::ErrorKind::ConnectionRefused) {
            let port = server.port_or_known_default().unwrap_or_default();
            return (ConnectionFailure::Refused, format!("connection refused: nothing listens on port {port} there"));
        }
    }
    (ConnectionFailure::Other, innermost)
}

fn tls_failure(host: &str, error: &rustls::Error) -> Option<(ConnectionFailure, String)> {
    let error = match error {
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            return Some((ConnectionFailure::PlainHttp, "it does not speak HTTPS; perhaps it speaks HTTP".to_owned()));
        }
        rustls::Error::InvalidCertificate(error) => error,
        _ => return None,
    };
    Some(match error {
        CertificateError::UnknownIssuer => (
            ConnectionFailure::UnknownIssuer,
            "its certificate is signed by an authority that this machine does not trust".to_owned(),
        ),
        CertificateError::NotValidForNameContext { presented, .. } => {
            let names: Vec<&str> = presented.iter().map(|name| bare_name(name)).collect();
            let names = if names.is_empty() { "no name at all".to_owned() } else { names.join(", ") };
            (ConnectionFailure::WrongName, format!("its certificate is not for {host}, but for {names}"))
        }
        CertificateError::NotValidForName => {
            (ConnectionFailure::WrongName, format!("its certificate is not for {host}"))
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            (ConnectionFailure::Expired, format!("its certificate expired{}", at(*not_after)))
        }
        CertificateError::Expired => (ConnectionFailure::Expired, "its certificate has expired".to_owned()),
        CertificateError::NotValidYetContext { not_before, .. } => {
            (ConnectionFailure::NotYetValid, format!("its certificate becomes valid only{}", at(*not_before)))
        }
        CertificateError::NotValidYet => {
            (ConnectionFailure::NotYetValid, "its certificate is not valid yet".to_owned())
        }
        other => (ConnectionFailure::BadCertificate, format!("its certificate is not accepted: {other}")),
    })
}

/// An error and what caused it, outermost first.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(Some(error), |&error| {
        // An I/O error's `source` is that of the error it wraps, so ask for the wrapped error itself.
        let wrapped = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        wrapped.map(|wrapped| wrapped as &(dyn Error + 'static)).or_else(|| error.source())
    })
}

/// `DnsName("loom.example")` as `loom.example`.
fn bare_name(name: &str) -> &str {
    name.split_once('(').and_then(|(_, rest)| rest.strip_suffix(')')).unwrap_or(name).trim_matches('"')
}

/// ` on 2026-01-02`; empty if the time is out of range.
fn at(time: UnixTime) -> String {
    let date = i64::try_from(time.as_secs()).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    date.map_or_else(String::new, |date| format!(" on {}", date.strftime("%Y-%m-%d")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificates_failure_says_what_is_wrong_with_it() {
        let day = |seconds| UnixTime::since_unix_epoch(std::time::Duration::from_secs(seconds));
        let name = || "loom.example".try_into().expect("a name");
        for (error, failure, words) in [
            (CertificateError::UnknownIssuer, ConnectionFailure::UnknownIssuer, "does not trust"),
            (
                CertificateError::ExpiredContext { time: day(200_000), not_after: day(86_400) },
                ConnectionFailure::Expired,
                "on 1970-01-02",
            ),
            (
                CertificateError::NotValidYetContext { time: day(0), not_before: day(86_400) },
                ConnectionFailure::NotYetValid,
                "only on 1970-01-02",
            ),
            (
                CertificateError::NotValidForNameContext {
                    expected: name(),
                    presented: vec!["DnsName(\"a.example\")".into(), "b.example".into()],
                },
                ConnectionFailure::WrongName,
                "not for loom.example, but for a.example, b.example",
            ),
            (CertificateError::Revoked, ConnectionFailure::BadCertificate, "not accepted"),
        ] {
            let (kind, reason) = tls_failure("loom.example", &rustls::Error::InvalidCertificate(error)).expect("known");
            assert_eq!(kind, failure, "{reason}");
            assert!(reason.contains(words), "{reason}");
        }
    }

    #[test]
    fn causes_include_what_an_io_error_wraps() {
        let inner = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let outer = io::Error::other(io::Error::other(inner));
        assert!(causes(&outer).any(|cause| cause.is::<rustls::Error>()));
    }
}
