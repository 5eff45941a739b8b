//! The one call of librdkafka that rdkafka has only for clients whose events are polled, which an admin client's never
//! are, and a consumer's not before its first record.
#![expect(unsafe_code, reason = "rdkafka has no safe form of it")]

use std::{
    ffi::{CStr, CString},
    ptr,
    time::UNIX_EPOCH,
};

use rdkafka::{
    ClientContext,
    bindings::{rd_kafka_oauthbearer_set_token, rd_kafka_resp_err_t},
    client::Client,
};

use super::parse::Token;

/// Asked for and never sent: the broker reads the token.
const PRINCIPAL: &CStr = c"whippet";

/// The client logs in with it from now on, and connects at once where it waited for one.
pub(super) fn hand_over<C: ClientContext>(client: &Client<C>, token: &Token) -> Result<(), String> {
    let text = CString::new(token.text.as_str()).map_err(|error| error.to_string())?;
    let until = token.until.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis() as i64;
    let mut why = [0_u8; 512];
    // SAFETY: the client is there for as long as it is borrowed, and librdkafka lets any thread call this. Both texts
    // end with a zero and are copied by it. There are no extensions: none are read. It writes no more to `why` than its
    // length, and ends it with a zero.
    let code = unsafe {
        rd_kafka_oauthbearer_set_token(
            client.native_ptr(),
            text.as_ptr(),
            until,
            PRINCIPAL.as_ptr(),
            ptr::null_mut(),
            0,
            why.as_mut_ptr().cast(),
            why.len(),
        )
    };
    if code == rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
        return Ok(());
    }
    Err(CStr::from_bytes_until_nul(&why).unwrap_or_default().to_string_lossy().into_owned())
}
