//! W3C Trace Context: what a `traceparent` is, and whether its trace is recorded.

pub const TRACEPARENT: &str = "traceparent";
pub const TRACESTATE: &str = "tracestate";
pub const BAGGAGE: &str = "baggage";

/// The flag of a `traceparent` that says that its trace is recorded.
const SAMPLED: u8 = 1;

/// The span that a row was written in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parent {
    pub trace: [u8; 16],
    pub span: [u8; 8],
    pub flags: u8,
    /// Its `tracestate`, as it is.
    pub state: Option<Box<str>>,
}

impl Parent {
    /// `None` where it is no `traceparent`.
    pub fn parse(traceparent: &[u8], tracestate: Option<&str>) -> Option<Parent> {
        if !is_traceparent(Some(traceparent)) {
            return None;
        }
        Some(Parent {
            trace: unhex(&traceparent[3..35]),
            span: unhex(&traceparent[36..52]),
            flags: unhex::<1>(&traceparent[53..55])[0],
            state: tracestate.map(Box::from),
        })
    }

    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }
}

/// Digits that were looked at before.
fn unhex<const N: usize>(digits: &[u8]) -> [u8; N] {
    let value = |digit: u8| if digit.is_ascii_digit() { digit - b'0' } else { digit - b'a' + 10 };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0]) << 4 | value(pair[1]);
    }
    bytes
}

/// "traceparent Header": `version-trace_id-parent_id-flags` in lower-case hex,
/// neither id all zeros, version not `ff`. A later version may have more behind another dash.
pub fn is_traceparent(value: Option<&[u8]>) -> bool {
    let Some(value) = value else { return false };
    if value.len() < 55 || [2, 35, 52].iter().any(|dash| value[*dash] != b'-') {
        return false;
    }
    let (version, trace, parent, flags) = (&value[..2], &value[3..35], &value[36..52], &value[53..55]);
    let hex = |part: &[u8]| part.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    let zero = |part: &[u8]| part.iter().all(|b| *b == b'0');
    let end = match version {
        b"ff" => false,
        b"00" => value.len() == 55,
        _ => value.len() == 55 || value[55] == b'-',
    };
    end && [version, trace, parent, flags].into_iter().all(hex) && !zero(trace) && !zero(parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn traceparent_is_what_w3c_says() {
        let zero_trace = format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32));
        let zero_parent = format!("00-{}-{}-01", "a".repeat(32), "0".repeat(16));
        let later = format!("01{}-more", &GOOD[2..]);
        for (value, good) in [
            (GOOD, true),
            (&*later, true),
            (&*format!("{GOOD}-more"), false),
            (&*GOOD.to_uppercase(), false),
            (&*format!("ff{}", &GOOD[2..]), false),
            (&*zero_trace, false),
            (&*zero_parent, false),
            ("", false),
        ] {
            assert_eq!(is_traceparent(Some(value.as_bytes())), good, "{value}");
        }
    }

    #[test]
    fn a_parent_is_read_byte_by_byte() {
        let parent = Parent::parse(GOOD.as_bytes(), Some("a=b")).unwrap();
        assert_eq!(u128::from_be_bytes(parent.trace), 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736);
        assert_eq!(u64::from_be_bytes(parent.span), 0x00f0_67aa_0ba9_02b7);
        assert_eq!((parent.flags, parent.state.as_deref()), (1, Some("a=b")));
        let of = |flags| Parent::parse(format!("{}{flags}", &GOOD[..53]).as_bytes(), None).unwrap();
        assert_eq!(
            ["00", "01", "02", "03", "fe"].map(|f| of(f).is_sampled()),
            [false, true, false, true, false]
        );
        assert_eq!(Parent::parse(b"00-zz", None), None);
    }
}
