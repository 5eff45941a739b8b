//! Problem details (RFC 9457).

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

/// Why a request was refused.
#[derive(Debug, Serialize)]
pub struct Problem {
    #[serde(skip)]
    pub code: StatusCode,
    /// When to try again.
    #[serde(skip)]
    retry_after: Option<Duration>,
    title: &'static str,
    status: u16,
    pub detail: String,
}

impl Problem {
    pub fn new(code: StatusCode, detail: impl Into<String>) -> Problem {
        let title = code.canonical_reason().unwrap_or("error");
        Problem { code, retry_after: None, title, status: code.as_u16(), detail: detail.into() }
    }

    pub fn bad(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, detail)
    }

    /// Says what it is about.
    pub fn of(self, what: &str) -> Problem {
        Problem { detail: format!("{what}: {}", self.detail), ..self }
    }

    /// It may be tried again after so long.
    #[cfg_attr(not(feature = "sqlite"), expect(dead_code, reason = "of ingest, which needs SQLite"))]
    pub fn retry_after(self, pause: Duration) -> Problem {
        Problem { retry_after: Some(pause), ..self }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = (self.code, Json(&self)).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.code == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(pause) = self.retry_after {
            headers.insert(header::RETRY_AFTER, pause.as_secs().max(1).into());
        }
        response
    }
}
