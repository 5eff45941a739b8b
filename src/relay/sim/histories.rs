//! Histories that a seed chooses, and some that are written out.

use std::time::Duration;

use super::{
    World,
    table::{Poison, Row, State},
};
use crate::{
    config::{OnFailure, Order},
    event::TableIx,
    relay::{
        core::{self, Action},
        retry::GiveUp,
        window::Room,
    },
    source::Yield,
};

fn history(seed: u64, orders: &[Order], give_up: GiveUp, exactly_once: bool) -> World {
    let mut world = World::with(seed, orders, give_up, exactly_once);
    for _ in 0..world.random.usize(50..400) {
        if world.random.u32(0..10) == 0 {
            let rows = world.random.usize(1..12);
            world.insert(rows);
        }
        world.step();
    }
    world.settle(seed);
    world
}

/// Of tables, and with what becomes of what fails, that the seed chooses.
fn random_history(seed: u64, exactly_once: bool) -> World {
    let orders: &[Order] = match seed % 4 {
        0 => &[Order::Key],
        1 => &[Order::Key, Order::None],
        2 => &[Order::Table],
        _ => &[Order::Key, Order::Table, Order::None],
    };
    let after = (seed.is_multiple_of(3)).then_some(Duration::from_secs(20));
    let then = if seed.is_multiple_of(5) { OnFailure::DeadLetter } else { OnFailure::Park };
    history(seed, orders, GiveUp { after, then }, exactly_once)
}

#[test]
fn random_histories_keep_the_promises() {
    let (mut refused, mut rebuilt, mut published) = (0, 0, 0);
    let (mut changed, mut released, mut buried) = (0, 0, 0);
    let (mut chunked, mut referred, mut reloads) = (0, 0, 0);
    for seed in 0..1_500 {
        let world = random_history(seed, false);
        (changed, released) = (changed + world.changed, released + world.released);
        reloads += world.reloads;
        buried += world.broker.dead.len();
        refused += world.broker.refused;
        rebuilt += world.broker.rebuilt;
        published += world.broker.first.len();
        chunked += world.broker.chunked.len();
        referred += world.broker.referred.len();
    }
    // Histories in which nothing happens prove nothing.
    assert!(refused > 500 && rebuilt > 1_000 && published > 20_000, "{refused} {rebuilt} {published}");
    assert!(chunked > 1_000 && referred > 1_000, "{chunked} {referred}");
    assert!(reloads > 500, "{reloads}");
    assert!(changed > 500 && released > 100 && buried > 100, "{changed} {released} {buried}");
}

/// Each is seen once: the broker shows a transaction whole or not at all, and panics at what it shows twice.
#[test]
fn random_histories_in_transactions_show_every_event_once() {
    let (mut committed, mut lost, mut dropped, mut rebuilt, mut published, mut buried) = (0, 0, 0, 0, 0, 0);
    let (mut overlapped, mut unheard, mut in_two, mut too_late) = (0, [0; 2], 0, 0);
    for seed in 0..800 {
        let world = random_history(seed, true);
        (committed, lost, dropped) =
            (committed + world.committed, lost + world.lost, dropped + world.dropped);
        rebuilt += world.broker.rebuilt;
        published += world.broker.first.len();
        buried += world.broker.dead.len();
        (overlapped, in_two) = (overlapped + world.overlapped, in_two + world.in_two);
        too_late += world.too_late;
        unheard = [0, 1].map(|done| unheard[done] + world.unheard[done]);
    }
    // While one was committed, the next one had records, and while one was waited for.
    assert!(in_two > 100, "{in_two}");
    // Answers about transactions of a generation that is over, while one of the next was waited for.
    assert!(too_late > 50, "{too_late}");
    assert!(overlapped > 500 && unheard.iter().all(|count| *count > 50), "{overlapped} {unheard:?}");
    assert!(committed > 5_000 && lost > 50 && dropped > 100, "{committed} {lost} {dropped}");
    assert!(rebuilt > 1_000 && published > 10_000 && buried > 50, "{rebuilt} {published} {buried}");
}

/// Rows 1, 2 and 3 of one key in flight, 1 refused by the broker.
#[test]
fn a_refused_row_is_parked_with_those_behind_it_and_its_neighbours_pass() {
    let mut world = World::new(7, &[Order::Key], GiveUp::default());
    world.faults = false;
    for (key, poison) in
        [("a", Poison::Broker), ("b", Poison::None), ("a", Poison::None), ("a", Poison::None)]
    {
        world.tables[0].rows.push(Row {
            topic: "topic0".into(),
            key: Some(key.into()),
            poison,
            large: false,
            state: State::Waiting,
        });
    }
    world.settle(7);
    let states: Vec<State> = world.tables[0].rows.iter().map(|row| row.state).collect();
    assert_eq!(states, [State::Held, State::Recorded, State::Held, State::Held]);
    assert_eq!((world.core.parked_keys(TableIx(0)), world.core.held_counts(TableIx(0)).parked), (1, 3));
}

#[test]
fn without_the_lease_nothing_is_sent() {
    let mut world = World::new(1, &[Order::Key], GiveUp::default());
    world.lease(false);
    world.rebuilds = 0;
    world.rebuilt(false);
    world.insert(10);
    for _ in 0..20 {
        world.tables[0].turn(&world.window, 10, &world.broker);
        while let Some(yielded) = world.tables[0].yields.pop_front() {
            world.apply(Action::FromSource(TableIx(0), yielded));
        }
        world.answer_look_up();
    }
    assert_eq!(world.broker.sent(), 0);
    assert!(world.core.open() > 0, "they were taken in");
}

/// Whoever has the lease next reads it: it is not waited for, and what comes of it later counts for nothing.
#[test]
fn what_is_in_flight_when_the_lease_is_lost_is_thrown_away() {
    for exactly_once in [false, true] {
        let mut world = World::with(1, &[Order::Key], GiveUp::default(), exactly_once);
        world.faults = false;
        world.insert(10);
        while world.broker.sent() < 3 {
            world.step();
        }
        let generation = world.core.generation();
        assert!(world.core.open() > 0 && world.rebuilds == 0);
        world.lease(false);
        assert_ne!(world.core.generation(), generation);
        assert_eq!((world.core.open(), world.rebuilds), (0, 1));
        world.lease(true);
        world.settle(1);
    }
}

#[test]
fn events_of_an_older_generation_give_their_room_back() {
    let mut world = World::new(1, &[Order::Key], GiveUp::default());
    world.insert(1);
    assert!(world.window.claim(1, 100));
    let events = vec![world.tables[0].event(0)];
    let bytes = core::window_bytes(&events[0]);
    world.window.adjust(100, bytes);
    world.apply(Action::FromSource(TableIx(0), Yield::Events { generation: 77, events }));
    assert_eq!(world.window.used(), Room::default());
    assert_eq!(world.core.open(), 0);
}
