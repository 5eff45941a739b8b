//! What the histories do not look at: an object store that takes the probe and no payload, a row that needs
//! more room than those leave who wait for the store, and a topic that takes less than it did.

use bytes::Bytes;

use super::*;
use crate::{
    event::{Event, Place},
    record::{Landed, Packing, encode::Codec},
    sink::{Report, Takes, Ticket},
    source::Gates,
};

/// The table's rows; odd seeds are claim checks.
fn world(rows: &[(&str, bool)]) -> World {
    let mut world = World::new(7, &[Order::Key], GiveUp::default());
    world.faults = false;
    for (key, large) in rows {
        world.tables[0].rows.push(Row {
            topic: "topic0".into(),
            key: Some((*key).into()),
            poison: Poison::None,
            large: *large,
            state: State::Waiting,
        });
    }
    world
}

impl World {
    fn states(&self) -> Vec<State> {
        self.tables[0].rows.iter().map(|row| row.state).collect()
    }

    /// Everything is done at once, and time goes on from one thing that is due to the next.
    fn run_until(&mut self, enough: impl Fn(&World) -> bool) {
        let end = self.now + Duration::from_mins(2);
        while !enough(self) {
            assert!(self.now < end, "it does not come to that: {:?}", self.states());
            for _ in 0..10 {
                self.tables[0].turn(&self.window, 10, &self.broker);
                while let Some(yielded) = self.tables[0].yields.pop_front() {
                    self.apply(Action::FromSource(TableIx(0), yielded));
                }
                let reports = self.broker.turn(&mut self.random, false, &self.tables);
                self.apply(Action::Reports(reports));
                self.answer_look_up();
                self.pack();
            }
            let due = self.core.next_due().unwrap_or_default().saturating_sub(self.now);
            self.now += due.clamp(Duration::from_millis(1), Duration::from_secs(1));
            self.lease(true);
        }
    }
}

#[test]
fn a_store_that_takes_the_probe_and_no_payload_is_tried_ever_more_seldom_and_its_events_are_held() {
    let mut world = world(&[("a", true), ("b", false), ("a", false)]);
    world.takes_payloads = false;
    world.run_until(|world| world.states() == [State::Held, State::Recorded, State::Held]);
    assert!(world.now > Duration::from_secs(29), "{:?}", world.now);
    assert!(world.tries < 20, "{} tries in {:?}", world.tries, world.now);
    world.settle(7);
    assert_eq!(world.states(), [State::Recorded; 3]);
}

#[test]
fn a_row_that_finds_no_room_does_not_wait_for_the_store_with_those_before_it() {
    let mut world = world(&[("a", true), ("b", false)]);
    world.store = false;
    world.run_until(|world| world.tries == 1 && world.states()[1] == State::Recorded);
    // What a source does with a row that has to travel alone.
    assert!(!world.window.claim(1, 9_000));
    let soon = world.now + Duration::from_secs(10);
    world.run_until(|world| world.states()[0] == State::Held);
    assert!(world.now < soon, "{:?}", world.now);
}

/// Packed for what the topic took, and sent when it takes less: packed again, not refused.
#[test]
fn a_payload_that_fitted_when_it_was_packed_is_packed_again() {
    let mut world = World::new(7, &[Order::Key], GiveUp::default());
    let spec = Spec {
        id: "id".into(),
        payload: "payload".into(),
        topic_template: Some("topic0".into()),
        key: Some("key".into()),
        large: LargeSpec {
            encode: Some((Codec::Gzip, 100)),
            oversize: Oversize::ClaimCheck,
            reference_key: "{topic}/{id}-{sha256}".into(),
            whippet: true,
            ..LargeSpec::default()
        },
        ..Spec::default()
    };
    let rules = Rules::compile(&spec).unwrap();
    let events = ["1", "2"].map(|id| {
        let mut row = crate::event::Row::default();
        for column in rules.columns() {
            row.push(Some(match column.as_str() {
                "id" => id.as_bytes(),
                "key" => b"k",
                _ => &[b'x'; 1_000],
            }));
        }
        let place = Place::Int(id.parse().unwrap());
        Event { place, row, timestamp_ms: None, unread_bytes: None, replay: None }
    });
    let table = core::Table {
        keeps_rows: true,
        name: "t0".into(),
        rules,
        order: Order::Key,
        retry: Policy::default(),
        give_up: GiveUp::default(),
        max_held: u64::MAX,
    };
    let window = Window::new(Room { events: 10, bytes: 10_000 });
    world.core = Core::new(vec![Arc::new(table)], window, Arc::new(Metrics::new(&["t0"])));
    world.lease(true);
    let takes = |bytes| {
        let takes = Some(Takes { max_message_bytes: Some(bytes), compacted: false });
        let facts = TopicFacts { partitions: 1, takes };
        Action::LookedUp { topic: "topic0".into(), result: Ok(facts) }
    };
    let from_source = |yielded| Action::FromSource(TableIx(0), yielded);
    world.apply(from_source(Yield::Gates { generation: 0, serial: 0, gates: Gates::default() }));
    world.apply(from_source(Yield::Events { generation: 0, events: events.into() }));
    world.apply(takes(5_000_000));
    assert_eq!(world.packings.len(), 2, "the second one is packed ahead");
    let packed = |job: Job, bytes| Action::Packed {
        ticket: job.ticket,
        number: job.number,
        result: Ok(Packed {
            encoding: job.packing.codec,
            form: Form::Inline(Bytes::from(vec![b'x'; bytes])),
        }),
        took: Duration::ZERO,
    };
    let second = world.packings.pop_back().unwrap();
    world.apply(packed(second, 3_000_000));
    world.apply(takes(2_000_000));
    let first = world.packings.pop_back().unwrap();
    // It warms the partition.
    let acknowledged = Report { ticket: first.ticket, result: Ok(Landed::default()) };
    world.apply(packed(first, 10));
    world.apply(Action::Reports(vec![acknowledged]));
    let again = world.packings.pop_back().map(|Job { packing: Packing { inline, .. }, .. }| inline);
    assert!(again.is_some_and(|inline| inline < 2_000_000), "{again:?}");
    assert_eq!(world.core.parked_keys(TableIx(0)), 0);
}

/// A world with one event, which is large.
fn with_a_large_row(seed: u64) -> World {
    let mut world = World::new(seed, &[Order::Key], GiveUp::default());
    world.faults = false;
    world.tables[0].rows.push(Row {
        topic: "topic0".into(),
        key: Some("a".into()),
        poison: Poison::None,
        large: true,
        state: State::Waiting,
    });
    world
}

/// The table reads, and the relay is told.
fn turn(world: &mut World) {
    world.tables[0].turn(&world.window, 10, &world.broker);
    while let Some(yielded) = world.tables[0].yields.pop_front() {
        world.apply(Action::FromSource(TableIx(0), yielded));
    }
}

/// The same with its payload about to be packed.
fn with_a_large_event(seed: u64) -> (World, Ticket) {
    let mut world = with_a_large_row(seed);
    while world.packings.is_empty() {
        turn(&mut world);
        world.answer_look_up();
    }
    let ticket = world.packings[0].ticket;
    (world, ticket)
}

/// What was acknowledged of a payload makes room for others, once the row is gone.
#[test]
fn room_is_given_back_chunk_by_chunk() {
    let (mut world, ticket) = with_a_large_event(2);
    world.pack();
    let whole = world.window.used().bytes;
    let mut acknowledged = || {
        world.apply(Action::Reports(vec![Report { ticket, result: Ok(Landed::default()) }]));
        world.window.used().bytes
    };
    // The first one warms its partition; the others are sent after it.
    assert_eq!([acknowledged(), acknowledged(), acknowledged()], [whole, whole - whole / 2, 0]);
}

/// What is in the store makes room for others, however long Kafka takes.
#[test]
fn room_of_a_payload_is_given_back_when_its_reference_is_sent() {
    let (mut world, ticket) = with_a_large_event(1);
    let whole = world.window.used().bytes;
    world.pack();
    let left = world.window.used().bytes;
    assert!(left > 0 && left < whole - LARGE / 2, "{left} of {whole}");
    world.apply(Action::Reports(vec![Report { ticket, result: Ok(Landed::default()) }]));
    assert_eq!(world.window.used().bytes, 0);
}

/// Chunks wait until it is known whether the topic is compacted, and not for ever.
#[test]
fn chunks_do_not_go_to_a_topic_of_which_nothing_is_known() {
    let told = |compacted| Some(Takes { max_message_bytes: None, compacted });
    for (last, parks) in [
        (Ok(told(true)), true),
        (Ok(told(false)), false),
        (Ok(None), false),
        // Of a topic that was there, and is not to be made anew.
        (Err(Code::PolicyViolation), false),
    ] {
        let mut world = with_a_large_row(2);
        let (mut asked, mut turns) = (0, 0);
        while world.packings.is_empty() && world.core.parked_keys(TableIx(0)) == 0 {
            turns += 1;
            assert!(turns < 100, "{last:?}: asked {asked} times");
            turn(&mut world);
            if let Some(topic) = world.look_ups.pop_front() {
                asked += 1;
                let takes = if asked == 1 { Ok(None) } else { last };
                let result = takes.map(|takes| TopicFacts { partitions: 1, takes });
                world.apply(Action::LookedUp { topic, result });
            }
        }
        let times = if matches!(last, Ok(Some(_))) { 2 } else { 3 };
        assert_eq!((asked, world.core.parked_keys(TableIx(0)) == 1), (times, parks), "{last:?}");
    }
}
