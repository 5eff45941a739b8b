//! What to do about a failure: one table, and the pause before the next try.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

use crate::sink::Kind;

/// The pauses between tries, for one table or one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The longest first pause.
    pub initial: Duration,
    /// The longest pause of all.
    pub max: Duration,
    /// Full jitter: a pause is anything from zero to the longest of its turn, so that many relays
    /// do not come back at once (AWS Architecture Blog, "Exponential Backoff And Jitter").
    pub jitter: bool,
}

impl Policy {
    /// The pause before try `attempt` (from 1), with `random` in `0.0..=1.0`.
    pub fn pause(&self, attempt: u32, random: f64) -> Duration {
        let mut pauses = ExponentialBuilder::default()
            .with_min_delay(self.initial)
            .with_max_delay(self.max)
            .with_factor(2.0)
            .without_max_times()
            .build();
        // Doubling reaches any maximum within 64 steps.
        let step = attempt.saturating_sub(1).min(64) as usize;
        let longest = pauses.nth(step).unwrap_or(self.max);
        if self.jitter { longest.mul_f64(random.clamp(0.0, 1.0)) } else { longest }
    }
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { initial: Duration::from_millis(100), max: Duration::from_secs(30), jitter: true }
    }
}

/// What happens to an event whose own try failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Again, after a pause.
    Retry,
    /// Its key is parked.
    Park,
    /// The producer is rebuilt and everything un-acknowledged is read again.
    Rebuild,
}

/// The one place where a kind of failure becomes an action. Retries never end.
pub fn decide(kind: Kind) -> Decision {
    match kind {
        Kind::Transient => Decision::Retry,
        Kind::Rejected => Decision::Park,
        Kind::Fatal => Decision::Rebuild,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_decision() {
        assert_eq!(decide(Kind::Transient), Decision::Retry);
        assert_eq!(decide(Kind::Rejected), Decision::Park);
        assert_eq!(decide(Kind::Fatal), Decision::Rebuild);
    }

    #[test]
    fn pauses_double_up_to_the_longest_and_never_end() {
        let policy =
            Policy { initial: Duration::from_millis(100), max: Duration::from_secs(30), jitter: false };
        let pause = |attempt| policy.pause(attempt, 1.0).as_millis();
        assert_eq!([pause(1), pause(2), pause(3), pause(4)], [100, 200, 400, 800]);
        assert_eq!(pause(20), 30_000);
        assert_eq!(pause(u32::MAX), 30_000);
    }

    #[test]
    fn full_jitter_takes_any_part_of_the_pause() {
        let policy = Policy::default();
        assert_eq!(policy.pause(3, 0.0), Duration::ZERO);
        // A float in between: not exact to the nanosecond.
        assert_eq!(policy.pause(3, 0.5).as_millis(), 200);
        assert_eq!(policy.pause(3, 1.0).as_millis(), 400);
    }
}
