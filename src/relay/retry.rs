//! What to do about a failure: one table, and the pause before the next try.

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBuilder};

use crate::{config::OnFailure, sink::Kind, source::Cause};

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

/// What a table does with an event that cannot be published.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GiveUp {
    /// For how long an event of its own may fail; `None`: for ever.
    pub after: Option<Duration>,
    pub then: OnFailure,
}

/// What happens to an event whose own try failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Again, after a pause.
    Retry,
    /// Its key is parked.
    Park(Cause),
    /// Its dead letter is published, and its key flows on.
    DeadLetter(Cause),
    /// Its key is parked and the table stops.
    Halt(Cause),
    /// The producer is rebuilt and everything un-acknowledged is read again.
    Rebuild,
}

/// The one place where a kind of failure becomes an action. `failing` is how long the event has been
/// failing by itself; without `give_up_after`, retries never end.
pub fn decide(kind: Kind, failing: Duration, give_up: GiveUp) -> Decision {
    let cause = match kind {
        Kind::Fatal => return Decision::Rebuild,
        Kind::Rejected => Cause::Rejected,
        Kind::Transient if give_up.after.is_some_and(|after| failing >= after) => Cause::GaveUp,
        Kind::Transient => return Decision::Retry,
    };
    match give_up.then {
        OnFailure::Park => Decision::Park(cause),
        OnFailure::DeadLetter => Decision::DeadLetter(cause),
        OnFailure::Halt => Decision::Halt(cause),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_decision() {
        let (second, hour) = (Duration::from_secs(1), Duration::from_hours(1));
        let never = GiveUp::default();
        assert_eq!(decide(Kind::Transient, hour, never), Decision::Retry);
        assert_eq!(decide(Kind::Rejected, Duration::ZERO, never), Decision::Park(Cause::Rejected));
        assert_eq!(decide(Kind::Fatal, hour, never), Decision::Rebuild);
        for (then, rejected, gave_up) in [
            (OnFailure::Park, Decision::Park(Cause::Rejected), Decision::Park(Cause::GaveUp)),
            (
                OnFailure::DeadLetter,
                Decision::DeadLetter(Cause::Rejected),
                Decision::DeadLetter(Cause::GaveUp),
            ),
            (OnFailure::Halt, Decision::Halt(Cause::Rejected), Decision::Halt(Cause::GaveUp)),
        ] {
            let give_up = GiveUp { after: Some(second), then };
            assert_eq!(decide(Kind::Rejected, Duration::ZERO, give_up), rejected);
            assert_eq!(decide(Kind::Transient, Duration::ZERO, give_up), Decision::Retry);
            assert_eq!(decide(Kind::Transient, second, give_up), gave_up);
            assert_eq!(decide(Kind::Fatal, hour, give_up), Decision::Rebuild);
        }
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
