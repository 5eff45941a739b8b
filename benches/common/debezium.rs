//! Programs beside the relay, which are started and stopped in their own ways: Debezium in Kafka Connect, tuned.
//! These settings were the fastest that were found.

use std::{
    fs::File,
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::common::{Bench, Program};

pub struct Debezium {
    /// Kafka Connect's class path.
    jars: String,
    kafka: String,
    folder: PathBuf,
}

impl Debezium {
    pub fn new(bench: &Bench) -> anyhow::Result<Debezium> {
        Ok(Debezium {
            jars: format!("{}/*", std::env::var("WHIPPET_BENCH_DEBEZIUM_LIBS")?),
            kafka: bench.kafka.clone(),
            folder: bench.folder.path().to_owned(),
        })
    }

    /// A connector, by its class and where its rows are.
    pub fn start(&self, port: u16, poll_interval_ms: u64, connector: &str) -> anyhow::Result<Program> {
        let file = |name: &str| self.folder.join(name);
        std::fs::write(
            file("worker.properties"),
            format!(
                "bootstrap.servers={}
listeners=http://127.0.0.1:{port}
offset.storage.file.filename={}
key.converter=org.apache.kafka.connect.storage.StringConverter
value.converter=org.apache.kafka.connect.storage.StringConverter
offset.flush.interval.ms=1000
plugin.discovery=only_scan
producer.linger.ms=5
producer.batch.size=262144
producer.compression.type=lz4
",
                self.kafka,
                file("offsets").display()
            ),
        )?;
        std::fs::write(
            file("connector.properties"),
            format!(
                "name=bench
tasks.max=1
topic.prefix=bench
snapshot.mode=no_data
tombstones.on.delete=false
max.batch.size=8192
max.queue.size=32768
poll.interval.ms={poll_interval_ms}
transforms=outbox
transforms.outbox.type=io.debezium.transforms.outbox.EventRouter
transforms.outbox.route.by.field=topic
transforms.outbox.route.topic.replacement=${{routedByValue}}
transforms.outbox.table.field.event.key=key
transforms.outbox.table.fields.additional.placement=type:header:eventType
{connector}
"
            ),
        )?;
        std::fs::write(
            file("log4j2.properties"),
            "rootLogger.level = WARN\nrootLogger.appenderRef.out.ref = out\n\
             appender.out.type = Console\nappender.out.name = out\n\
             appender.out.layout.type = PatternLayout\nappender.out.layout.pattern = %d %p %m (%c)%n\n",
        )?;
        let log = File::create(file("debezium.log"))?;
        Ok(Program(
            Command::new("java")
                .args(["-Xmx1500m", "-cp", &self.jars])
                .arg(format!("-Dlog4j2.configurationFile={}", file("log4j2.properties").display()))
                .arg("org.apache.kafka.connect.cli.ConnectStandalone")
                .args([file("worker.properties"), file("connector.properties")])
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()?,
        ))
    }

    /// Where it was is that of an earlier log.
    pub fn forget(&self) {
        for name in ["offsets", "history"] {
            std::fs::remove_file(self.folder.join(name)).ok();
        }
    }

    /// The end of what it logged.
    pub fn log(&self) -> String {
        let log = std::fs::read_to_string(self.folder.join("debezium.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(20)..].iter().flat_map(|line| ["\n", line]).collect()
    }
}

impl Program {
    pub fn signal(&self, name: &str) -> anyhow::Result<()> {
        let status = Command::new("kill").args(["-s", name, &self.0.id().to_string()]).status()?;
        anyhow::ensure!(status.success(), "cannot send {name} to process {}", self.0.id());
        Ok(())
    }
}
