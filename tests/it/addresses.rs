//! Servers whose address is an IPv6 one, in brackets as URLs have it: the driver and the log's own connection reach both.

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
};

use crate::{harness::World, mysql, mysql_stream, stream};

/// The same server at the IPv6 loopback, for as long as the test runs.
async fn at_ipv6(url: &str) -> String {
    let (_, rest) = url.rsplit_once('@').unwrap();
    let (server, _) = rest.split_once('/').unwrap();
    let listener = TcpListener::bind("[::1]:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let upstream = server.to_owned();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let upstream = upstream.clone();
            tokio::spawn(async move {
                let mut server = TcpStream::connect(upstream).await.unwrap();
                // A connection that ends is the peers' business.
                copy_bidirectional(&mut client, &mut server).await.ok();
            });
        }
    });
    url.replace(server, &address)
}

async fn follows_at(world: &World, config: &str) {
    let topic = world.create_topic("events", 1, &[]).await;
    world.install(config).await;
    let config = config.replace(&world.url, &at_ipv6(&world.url).await);
    let relay = world.relay(&config);
    mysql_stream::follows(&relay).await;
    world.sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', 'here')")).await;
    assert_eq!(world.consumer(&topic).read(1)[0].text(), "here");
    assert_eq!(relay.stop().0, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_is_reached_at_an_ipv6_address() {
    let world = World::new("ipv6").await;
    let config = stream::streamed(&world, "{ name: outbox, capture: stream }");
    follows_at(&world, &config).await;
    world.sql(&stream::of_slot(&world, "pg_drop_replication_slot(slot_name)")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mariadb_and_mysql_are_reached_at_an_ipv6_address() {
    for server in ["mariadb", "mysql"] {
        let world = mysql::world(server).await;
        follows_at(&world, &mysql_stream::streamed(&world, "{ name: outbox, capture: stream }")).await;
    }
}
