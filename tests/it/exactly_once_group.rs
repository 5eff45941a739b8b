//! `kafka.delivery: exactly_once` with relays that take over from one another, and a network and a broker that fail.

use std::{
    collections::BTreeMap,
    os::unix::process::ExitStatusExt as _,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    error::RDKafkaErrorCode,
    producer::{BaseProducer, BaseRecord, Producer as _},
};

use crate::{
    exactly_once::{FAILPOINTS, LEFT, Once, flows, one_table},
    harness::{Consumer, Relay, SOON, Seen, World, in_soak, kafka, service, services},
    proxy::Proxy,
};

/// The longest that three relays that die again and again may take for something.
const AT_LAST: Duration = Duration::from_mins(2);

/// Relays of one source. Each dies at the step that is next, if nothing else comes first; then there is another one.
struct Pack {
    file: String,
    members: Vec<Member>,
    started: i64,
    /// How many died at which step.
    died: BTreeMap<&'static str, u32>,
    killed: u32,
    /// How many worked at a time, at most.
    most: i64,
    random: fastrand::Rng,
}

struct Member {
    relay: Relay,
    number: i64,
    dies_at: &'static str,
}

impl Pack {
    fn new(once: &Once) -> Pack {
        let mut random = fastrand::Rng::new();
        eprintln!("seed of the faults: {}", random.get_seed());
        let (file, members) = (once.file.clone(), Vec::new());
        // Any may be the first: where few die, they are others each time.
        let started = random.i64(0..FAILPOINTS.len() as i64);
        let mut pack = Pack { file, members, started, died: BTreeMap::new(), killed: 0, most: 0, random };
        (0..3).for_each(|_| pack.start());
        pack
    }

    fn start(&mut self) {
        let at = FAILPOINTS[self.started as usize % FAILPOINTS.len()];
        let skip = match at {
            "sent" => self.random.u32(..6_000),
            "eos-fencing" | "eos-half-initialised" | "eos-initialised" => self.random.u32(..3),
            _ => self.random.u32(..48),
        };
        self.started += 1;
        // The name in the source says who it is.
        let name = format!("relay-{}", self.started);
        let action = format!("{at}={skip}*off->return");
        let relay = Relay::start_with(&self.file, &[("FAILPOINTS", &action), ("HOSTNAME", &name)]);
        self.members.push(Member { relay, number: self.started, dies_at: at });
    }

    /// How many are gone, by whatever it was.
    fn gone(&self) -> u32 {
        self.killed + self.died.values().sum::<u32>()
    }

    /// At any moment, which is seldom one of the steps.
    fn kill(&mut self, index: usize) {
        self.members.swap_remove(index).relay.kill();
        self.killed += 1;
        self.start();
    }

    /// Others in the place of those that have died.
    fn replace(&mut self) {
        for index in (0..self.members.len()).rev() {
            if let Some(status) = self.members[index].relay.has_ended() {
                let dead = self.members.swap_remove(index);
                // It was a step's end, and no refusal to go on.
                assert!(status.signal().is_some(), "{status}:\n{}", dead.relay.log());
                *self.died.entry(dead.dies_at).or_default() += 1;
                self.start();
            }
        }
    }

    /// One of those that work, as the source says.
    async fn worker(&mut self, once: &Once) -> usize {
        let worker = "SELECT coalesce((SELECT split_part(m.owner, '-', 2)::bigint FROM whippet.parts p \
                      JOIN whippet.members m USING (epoch) WHERE part >= 0 AND expires_at > clock_timestamp() \
                      ORDER BY random() LIMIT 1), 0)";
        let workers = "SELECT count(DISTINCT epoch) FROM whippet.parts p JOIN whippet.members m USING (epoch) \
                       WHERE part >= 0 AND expires_at > clock_timestamp()";
        let deadline = Instant::now() + AT_LAST;
        loop {
            self.replace();
            self.most = self.most.max(once.world.number(workers).await);
            let number = once.world.number(worker).await;
            if let Some(index) = self.members.iter().position(|member| member.number == number) {
                return index;
            }
            assert!(Instant::now() < deadline, "nobody works");
            once.world.pause().await;
        }
    }

    /// What is written now is published.
    async fn publishes(&mut self, once: &Once, left: &str) {
        let all = once.world.number("SELECT coalesce(max(seq), 0) FROM outbox").await;
        let deadline = Instant::now() + AT_LAST;
        while once.world.number(&format!("{left} AND seq <= {all}")).await > 0 {
            assert!(Instant::now() < deadline, "it is not published");
            self.replace();
            once.world.pause().await;
        }
    }

    async fn some_time(&mut self, most: u64) {
        let ms = self.random.u64(..most);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }
}

/// How often something has to have happened.
#[derive(Clone, Copy)]
struct Faults {
    gone: u32,
    others: u32,
}

/// Three relays, of which two share the work and one stands by.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_seen_once_when_relays_take_over_from_one_another() {
    let faults = in_soak(Faults { gone: 5, others: 1 }, Faults { gone: 200, others: 1 });
    three_relays("eospack", 2, faults).await;
}

/// All three share the work: what a relay leaves is inherited by one that works.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_seen_once_when_three_relays_share_and_die() {
    let faults = in_soak(Faults { gone: 3, others: 0 }, Faults { gone: 200, others: 1 });
    three_relays("eosthree", 3, faults).await;
}

/// They die at every step, are killed at any moment, or stand still beyond their lease and come back; answers of the broker
/// are lost, and it is restarted.
async fn three_relays(name: &str, units: i64, faults: Faults) {
    let proxy = Proxy::kafka();
    let tables = "[{ name: outbox, after_publish: mark }]";
    let mut once = on_a_bad_network(name, tables, units).await;
    let left = "SELECT count(*) FROM outbox WHERE published_at IS NULL";
    let mut pack = Pack::new(&once);
    let (mut stopped, mut lost, mut restarts) = (0, 0, 0);
    let began = Instant::now();
    while pack.gone() < faults.gone
        || pack.most < units
        || [stopped, lost, restarts].iter().any(|times| *times < faults.others)
    {
        pack.worker(&once).await;
        pack.some_time(600).await;
        let worker = pack.worker(&once).await;
        match pack.random.u32(..10) {
            0 | 1 => pack.kill(worker),
            2 => {
                // It believes in its lease when it wakes up in the middle of its work.
                let zombie = pack.members.swap_remove(worker);
                zombie.relay.signal("STOP");
                pack.worker(&once).await;
                pack.publishes(&once, left).await;
                zombie.relay.signal("CONT");
                pack.members.push(zombie);
                stopped += 1;
            }
            3 | 4 => {
                lose_answers(&proxy, &mut pack.random).await;
                lost += 1;
            }
            5 if restarts < 1 + pack.gone() / 40 => {
                tokio::task::spawn_blocking(|| services("restart", "kafka")).await.unwrap();
                restarts += 1;
            }
            // Those that die by themselves.
            _ => pack.publishes(&once, left).await,
        }
    }
    eprintln!(
        "died at a step: {:?}; {} killed, {stopped} stood still, {lost} times answers were lost, {restarts} restarts of \
         the broker, {} worked at a time, in {:?}",
        pack.died,
        pack.killed,
        pack.most,
        began.elapsed()
    );
    assert_eq!(pack.most, units, "so many worked at a time");
    if faults.gone >= 100 {
        assert_eq!(pack.died.len(), FAILPOINTS.len(), "not at every step");
    }
    for Member { relay, .. } in pack.members {
        // A step may come first.
        let (code, log) = relay.stop();
        assert!(matches!(code, Some(0) | None), "{log}");
    }
    let last = Relay::start(&once.file);
    assert_eq!(once.end(left, last).await, 0, "repeats");
}

/// Events through the proxy, by clients that do not wait long for an answer.
async fn on_a_bad_network(name: &str, tables: &str, units: i64) -> Once {
    let world = World::new(name).await;
    let config = world.config_for(&world.url, &service("WHIPPET_TEST_KAFKA_PROXIED"), tables, "");
    let quick = "properties: { socket.timeout.ms: 3000, request.timeout.ms: 2000 },";
    let config = config.replace("kafka: {", &format!("kafka: {{ eos_units: {units}, {quick}"));
    Once::on(world, &config, "exactly_once").await
}

/// The broker has heard a request, and its answer comes to nobody.
async fn lose_answers(proxy: &Proxy, random: &mut fastrand::Rng) {
    proxy.deaf();
    tokio::time::sleep(Duration::from_millis(random.u64(20..150))).await;
    proxy.cut();
    proxy.heal();
}

/// One relay that nobody helps: it finds out by itself what became of its transactions.
#[tokio::test(flavor = "multi_thread")]
async fn each_event_is_seen_once_through_lost_answers_and_a_broker_restart() {
    let proxy = Proxy::kafka();
    let mut once = on_a_bad_network("eosnet", "[{ name: outbox }]", 4).await;
    let relay = Relay::start(&once.file);
    flows(&once, LEFT).await;
    let mut random = fastrand::Rng::new();
    for round in 0..in_soak(12, 100) {
        tokio::time::sleep(Duration::from_millis(random.u64(100..400))).await;
        lose_answers(&proxy, &mut random).await;
        if round == 5 {
            tokio::task::spawn_blocking(|| services("restart", "kafka")).await.unwrap();
        }
        if round % 4 == 3 {
            flows(&once, LEFT).await;
        }
    }
    flows(&once, LEFT).await;
    assert_eq!(once.end(LEFT, relay).await, 0, "repeats");
}

/// It was taking over, stood still while another relay did, published and noted it, and goes on where it was: what it
/// knows of the source is of yesterday, which is no reason to refuse the positions.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_stood_still_while_it_took_over_works_later() {
    let (world, topic, config) = one_table("eosstill").await;
    let file = world.write("whippet.yaml", &config);
    let late = Relay::start_with(&file, &[("FAILPOINTS", "eos-initialised=1*sleep(500)")]);
    // It has asked the source, and fences others.
    world.until("SELECT count(*) FROM whippet.positions WHERE part < -1", 1).await;
    late.signal("STOP");
    let other = Relay::start(&file);
    let insert = format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '1')");
    world.sql(&insert).await;
    world.until(LEFT, 0).await;
    world.until("SELECT count(*) FROM whippet.positions WHERE counter > 1", 1).await;
    late.signal("CONT");
    late.wait_for("standing by");
    other.kill();
    world.sql(&insert).await;
    world.until(LEFT, 0).await;
    assert_eq!(late.stop().0, Some(0));
    assert_eq!(world.consumer(&topic).read_committed().len(), 2);
}

/// A zombie that wakes up in its commit cannot commit, and says later that it was fenced.
#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_wakes_up_in_its_commit_was_fenced() {
    let (world, topic, config) = one_table("eosfenced").await;
    let file = world.write("whippet.yaml", &config);
    // The first commit is that of the takeover.
    let zombie = Relay::start_with(&file, &[("FAILPOINTS", "eos-before-commit=1*off->1*sleep(6000)->off")]);
    let insert =
        |text: &str| format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '{text}')");
    world.sql(&insert("one")).await;
    // It is in its commit when the position is there, after that of the takeover.
    Consumer::isolated(&topic, "read_uncommitted").read(1);
    Consumer::isolated(&world.topic("positions"), "read_uncommitted").read(2);
    zombie.signal("STOP");
    let heir = Relay::start(&file);
    world.until(LEFT, 0).await;
    zombie.signal("CONT");
    zombie.wait_for("another producer of this unit has fenced this relay's");
    heir.kill();
    world.sql(&insert("two")).await;
    world.until(LEFT, 0).await;
    assert_eq!(zombie.metric("whippet_unit_fenced_total", ""), 1.0);
    assert_eq!(zombie.metric("whippet_unit_takeovers_total", ""), 2.0);
    assert_eq!(zombie.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let texts: Vec<&str> = consumer.read_committed().iter().map(Seen::text).collect();
    assert_eq!(texts, ["one", "two"]);
}

/// A relay that begins while another one is gone and nobody knows it yet waits for what that one has open in the topic of the
/// positions, which nobody else would end for 18 seconds and more. It inherits before.
#[tokio::test(flavor = "multi_thread")]
async fn a_takeover_that_waits_for_a_relay_which_is_gone_is_given_up_to_inherit() {
    let (world, topic, config) = one_table("eosgone").await;
    let file = world.write("whippet.yaml", &config.replace("eos_units: 1", "eos_units: 2"));
    // The first commit is that of the takeover. It dies with its position written.
    let dies = Relay::start_with(&file, &[("FAILPOINTS", "eos-before-commit=1*off->return")]);
    world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', 'one')")).await;
    tokio::task::spawn_blocking(move || dies.ended()).await.unwrap();
    let began = Instant::now();
    let heir = Relay::start(&file);
    world.until(LEFT, 0).await;
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    assert_eq!(heir.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let texts: Vec<&str> = consumer.read_committed().iter().map(Seen::text).collect();
    assert_eq!(texts, ["one"]);
}

/// Two relays that take over at once are told apart by the id that is taken first: it has to be the same one for both.
#[tokio::test(flavor = "multi_thread")]
async fn the_two_ids_are_taken_one_after_the_other() {
    let (world, topic, config) = one_table("eosids").await;
    let relay = world.relay(&config);
    let unit = relay.wait_for("this relay is the one producer")["unit"].as_str().unwrap().to_owned();
    assert_eq!(relay.stop().0, Some(0));
    let other = |id: String| -> BaseProducer {
        let mut config = ClientConfig::new();
        let producer: BaseProducer =
            config.set("bootstrap.servers", kafka()).set("transactional.id", id).create().unwrap();
        producer.init_transactions(SOON).unwrap();
        producer.begin_transaction().unwrap();
        producer.send(BaseRecord::<str, str>::to(&topic).payload("open")).ok().unwrap();
        producer.flush(SOON).unwrap();
        producer
    };
    let fenced = |producer: &BaseProducer| {
        let error = producer.commit_transaction(SOON).unwrap_err().rdkafka_error_code();
        assert_eq!(error, Some(RDKafkaErrorCode::Fenced));
    };
    let (main, relief) = (other(unit.clone()), other(format!("{unit}-relief")));
    let file = world.write("whippet.yaml", &config);
    let dies = Relay::start_with(&file, &[("FAILPOINTS", "eos-half-initialised=return")]);
    tokio::task::spawn_blocking(move || dies.ended()).await.unwrap();
    fenced(&main);
    relief.commit_transaction(SOON).unwrap();
    // And both before anything is read.
    let (main, relief) = (other(unit.clone()), other(format!("{unit}-relief")));
    let dies = Relay::start_with(&file, &[("FAILPOINTS", "eos-initialised=return")]);
    tokio::task::spawn_blocking(move || dies.ended()).await.unwrap();
    fenced(&main);
    fenced(&relief);
}

/// A relay that is gone, or stands still, in an open transaction holds readers up until the broker ends that: 30 s at most,
/// though nobody takes over. And they see nothing of it.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_transaction_of_a_dead_relay_holds_readers_up_for_30_seconds_at_most() {
    let dies = async |signal: &str| {
        let (world, topic, config) = one_table("eosdies").await;
        let file = world.write("whippet.yaml", &config);
        // The first commit is that of the takeover.
        let relay = Relay::start_with(&file, &[("FAILPOINTS", "eos-before-commit=1*off->pause")]);
        world.sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', 'open')")).await;
        let (mut uncommitted, mut committed) =
            (Consumer::isolated(&topic, "read_uncommitted"), Consumer::new(&topic));
        let waited = tokio::task::spawn_blocking({
            let (topic, signal) = (topic.clone(), signal.to_owned());
            move || {
                assert_eq!(uncommitted.read(1)[0].text(), "open");
                relay.signal(&signal);
                let began = Instant::now();
                write(&topic, "after");
                let seen = committed.read(1)[0].text().to_owned();
                assert_eq!(seen, "after", "{signal}");
                let waited = began.elapsed();
                eprintln!("{signal}: readers waited for {waited:?}");
                assert!(waited < Duration::from_secs(30), "{signal}: {waited:?}");
                waited
            }
        })
        .await
        .unwrap();
        assert!(waited > Duration::from_secs(1), "nothing was open");
        // The next one publishes what was dropped.
        let heir = Relay::start(&file);
        world.until(LEFT, 0).await;
        assert_eq!(heir.stop().0, Some(0));
        let mut consumer = world.consumer(&topic);
        let texts: Vec<&str> = consumer.read_committed().iter().map(Seen::text).collect();
        assert_eq!(texts, ["after", "open"]);
    };
    tokio::join!(dies("KILL"), dies("STOP"));
}

/// By a producer without transactions.
fn write(topic: &str, text: &str) {
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", kafka()).create().unwrap();
    producer.send(BaseRecord::<str, str>::to(topic).payload(text)).ok().unwrap();
    producer.flush(SOON).unwrap();
}
