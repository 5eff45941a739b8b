//! Where the rows are: the database, its log, and the tables.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::{Error, Notes, Options, Rows, yaml::Node};

/// Where the password is to be put.
const PASSWORD_FILE: &str = "/run/secrets/db";
/// What of a URL's part is written in another way.
const SPECIAL: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_');

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Connector {
    Postgres,
    Mysql,
    Mariadb,
}

impl Connector {
    pub fn of(options: &mut Options) -> Result<Connector, Error> {
        let class = options.take("connector.class").ok_or(Error::NoConnector)?;
        match class.rsplit('.').next().unwrap_or_default() {
            "PostgresConnector" => Ok(Connector::Postgres),
            "MySqlConnector" => Ok(Connector::Mysql),
            "MariaDbConnector" => Ok(Connector::Mariadb),
            _ => Err(Error::OtherConnector(class)),
        }
    }

    /// As it names itself.
    pub fn name(self) -> &'static str {
        match self {
            Connector::Postgres => "postgresql",
            Connector::Mysql => "mysql",
            Connector::Mariadb => "mariadb",
        }
    }

    pub fn is_postgres(self) -> bool {
        self == Connector::Postgres
    }
}

pub struct Source {
    pub node: Node,
    /// As `tables[].name` has them.
    pub tables: Vec<String>,
}

pub fn source(connector: Connector, rows: Rows, options: &mut Options, notes: &mut Notes) -> Source {
    let tables = options.take_any(&["table.include.list", "table.whitelist"]);
    let (database, tables) = match connector {
        Connector::Postgres => {
            let database = options.value("database.dbname", "postgres", notes);
            (database.unwrap_or_else(|| "postgres".into()), names(tables.as_deref(), notes))
        }
        Connector::Mysql | Connector::Mariadb => mysql_names(tables.as_deref(), options, notes),
    };
    let mut entries = vec![("url", Node::Text(url(connector, &database, options, notes)))];
    if let Some(file) = password(options, notes) {
        entries.push(("password_file", file));
    }
    let tls = tls(connector, options, notes);
    if !tls.is_empty() {
        entries.push(("tls", Node::map(tls)));
    }
    let stream = match connector {
        Connector::Postgres => postgres_log(rows, options, notes),
        Connector::Mysql | Connector::Mariadb => mysql_log(options, notes),
    };
    entries.push(("stream", Node::map(stream)));
    let tables = if tables.is_empty() {
        notes.add(
            "tables",
            "the connector names no table that could be taken over: write the outbox's name here",
        );
        vec!["outbox".to_owned()]
    } else {
        tables
    };
    Source { node: Node::map(entries), tables }
}

fn url(connector: Connector, database: &str, options: &mut Options, notes: &mut Notes) -> String {
    let (scheme, port) = match connector {
        Connector::Postgres => ("postgres", "5432"),
        Connector::Mysql | Connector::Mariadb => ("mysql", "3306"),
    };
    let mut part = |name: &str, default: &str| {
        let value = options.value(name, default, notes).unwrap_or_else(|| default.to_owned());
        encoded(&value)
    };
    let user = part("database.user", "whippet");
    let host = part("database.hostname", "localhost");
    let port = part("database.port", port);
    format!("{scheme}://{user}@{host}:{port}/{}", encoded(database))
}

/// A part of a URL; a reference to the environment stays one.
fn encoded(part: &str) -> String {
    match part.starts_with("${") {
        true => part.to_owned(),
        false if part.starts_with('[') && part.ends_with(']') => part.to_owned(), // an IPv6 address
        false => utf8_percent_encode(part, SPECIAL).to_string(),
    }
}

fn password(options: &mut Options, notes: &mut Notes) -> Option<Node> {
    options.take("database.password")?;
    notes.add(
        "database.password",
        format!(
            "not copied: put the password into {PASSWORD_FILE}, or name another file in source.password_file"
        ),
    );
    Some(Node::Text(PASSWORD_FILE.into()))
}

fn tls(connector: Connector, options: &mut Options, notes: &mut Notes) -> Vec<(&'static str, Node)> {
    let option = if connector.is_postgres() { "database.sslmode" } else { "database.ssl.mode" };
    let asked = options.take(option).map(|mode| mode.to_ascii_lowercase().replace('_', "-"));
    let mut tls = Vec::new();
    let mut mode = |mode: &str| tls.push(("mode", Node::Text(mode.into())));
    match asked.as_deref() {
        None => {}
        Some("disable" | "disabled") => mode("disable"),
        Some("prefer" | "preferred") => mode("prefer"),
        Some("require" | "required") => mode("require"),
        Some("verify-full" | "verify-identity") => mode("verify-full"),
        Some("verify-ca") if connector.is_postgres() => mode("verify-ca"),
        Some("verify-ca") => {
            mode("verify-full");
            notes.add(
                option,
                "of MySQL the certificate is checked with its name: verify-full; `require` checks neither",
            );
        }
        Some("allow") => {
            mode("prefer");
            notes.add(option, "allow has no equal: prefer tries TLS first");
        }
        Some(_) => notes.add(option, "not understood: set source.tls.mode"),
    }
    for (option, key) in [("database.sslrootcert", "ca_file"), ("database.sslcert", "cert_file")] {
        if let Some(file) = options.value(option, "/etc/tls/db.pem", notes) {
            tls.push((key, Node::Text(file)));
        }
    }
    if let Some(file) = options.value("database.sslkey", "/etc/tls/db-key.pem", notes) {
        tls.push(("key_file", Node::Text(file)));
        notes.add(
            "database.sslkey",
            "has to be PEM, and without a password: openssl pkcs8 -inform der -nocrypt",
        );
    }
    if options.take("database.sslpassword").is_some() {
        notes.add("database.sslpassword", "not copied: the key has to be without a password");
    }
    let stores = options.take_all("database.ssl.keystore").into_iter();
    if stores.chain(options.take_all("database.ssl.truststore")).count() > 0 {
        notes.add(
            "database.ssl.keystore, database.ssl.truststore",
            "stores of Java are not read: write the certificates as PEM, and set source.tls.ca_file, cert_file, key_file",
        );
    }
    tls
}

fn postgres_log(rows: Rows, options: &mut Options, notes: &mut Notes) -> Vec<(&'static str, Node)> {
    let plugin = options.take("plugin.name");
    let slot = options.value("slot.name", "debezium", notes);
    let mut stream = Vec::new();
    if plugin.as_deref() == Some("pgoutput") {
        stream.push(("slot", Node::Text(slot.unwrap_or_else(|| "debezium".into()))));
        notes.add(
            "slot.name",
            "the same slot: the relay waits while Debezium reads it, and goes on where Debezium stopped",
        );
    } else {
        stream.push(("slot", Node::Text("whippet".into())));
        notes.add(
            "slot.name",
            "a slot of the plugin decoderbufs cannot be read here, so the relay makes one of its own. Stop writing, let \
             Debezium finish, start the relay, then go on",
        );
    }
    let publication = options.value("publication.name", "dbz_publication", notes);
    stream.push(("publication", Node::Text(publication.unwrap_or_else(|| "dbz_publication".into()))));
    match options.take("publication.autocreate.mode").as_deref() {
        Some("disabled") => {
            stream.push(("create", Node::Text("false".into())));
            notes.add(
                "publication.autocreate.mode",
                "disabled: the relay makes neither publication nor slot then",
            );
        }
        Some("no_tables") => {
            notes.add("publication.autocreate.mode", "no_tables has no equal: the relay adds its tables");
        }
        _ => {}
    }
    if options.take_bool("slot.drop.on.stop") == Some(true) {
        notes.add(
            "slot.drop.on.stop",
            "has to be false while Debezium is stopped, or events are lost with the slot",
        );
    }
    heartbeat(options, notes, &mut stream);
    if let Some(mode) = options.take("snapshot.mode").or_else(|| Some("initial".into()))
        && rows == Rows::Log
        && !["never", "no_data", "schema_only"].contains(&mode.as_str())
    {
        notes.add(
            "snapshot.mode",
            "rows that are in the table before the slot is made are not published: take Debezium's slot over, or import \
             with --rows stay",
        );
    }
    if !options.take_list("message.prefix.include.list").is_empty() {
        notes.add(
            "message.prefix.include.list",
            "logical messages are a table called message:PREFIX, whose JSON has id, topic, key, type, payload and headers",
        );
    }
    stream
}

fn mysql_log(options: &mut Options, notes: &mut Notes) -> Vec<(&'static str, Node)> {
    let mut stream = Vec::new();
    let id = options.take("database.server.id").filter(|id| id.parse::<u32>().is_ok_and(|id| id > 0));
    if let Some(id) = id {
        stream.push(("server_id", Node::Text(id)));
        notes.add("database.server.id", "two readers of one number end each other: stop Debezium first");
    }
    heartbeat(options, notes, &mut stream);
    options.take("snapshot.mode");
    stream
}

fn heartbeat(options: &mut Options, notes: &mut Notes, stream: &mut Vec<(&'static str, Node)>) {
    match options.take("heartbeat.interval.ms").map(|ms| ms.parse::<u64>()) {
        None | Some(Ok(0)) => {}
        Some(Ok(ms)) => stream.push(("heartbeat", Node::Text(format!("{}ms", ms.clamp(100, 3_600_000))))),
        Some(Err(_)) => {
            notes.add("heartbeat.interval.ms", "not a number: left out, so source.stream.heartbeat is 10s");
        }
    }
}

/// The tables that a list of patterns names literally.
fn names(list: Option<&str>, notes: &mut Notes) -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for pattern in list.unwrap_or_default().split(',').map(str::trim).filter(|pattern| !pattern.is_empty()) {
        match literal(pattern) {
            Some(name)
                if name.split('.').count() <= 2 && name.split('.').all(|part| !part.trim().is_empty()) =>
            {
                if !names.contains(&name) {
                    names.push(name);
                }
            }
            _ => {
                let says =
                    format!("{pattern:?} is no name of a table: write out the outboxes that it matches");
                notes.add("table.include.list", says);
            }
        }
    }
    names
}

/// The text that a pattern matches and nothing else; a dot is meant as one.
fn literal(pattern: &str) -> Option<String> {
    let pattern = pattern.strip_prefix('^').unwrap_or(pattern);
    let pattern = pattern.strip_suffix('$').unwrap_or(pattern);
    let name = pattern.replace("\\.", ".").replace("[.]", ".");
    (!name.contains(['\\', '*', '+', '?', '(', ')', '[', ']', '{', '}', '|', '^', '$'])).then_some(name)
}

/// The database, and the tables in it: `database.table` names both.
fn mysql_names(list: Option<&str>, options: &mut Options, notes: &mut Notes) -> (String, Vec<String>) {
    let tables = names(list, notes);
    let listed = options.take_any(&["database.include.list", "database.whitelist"]);
    let only = listed.as_deref().filter(|list| !list.contains(',')).and_then(literal);
    let first = tables.iter().find_map(|name| name.split_once('.')).map(|(database, _)| database.to_owned());
    let database = only.or(first).unwrap_or_else(|| {
        notes.add("source.url", "the connector names no database: write the outbox's into the URL");
        "app".into()
    });
    let prefix = format!("{database}.");
    let local = |name: &String| name.strip_prefix(&prefix).unwrap_or(name).to_owned();
    (database, tables.iter().map(local).collect())
}
