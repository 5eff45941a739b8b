//! Who used the processors: the relay shares them with all that it works with (proc(5), /proc/pid/stat).

use std::{
    collections::HashMap,
    ops::{Add, Sub},
};

use anyhow::Context as _;

/// Their names, and the variables that name the files with their process ids.
const SERVICES: [(&str, &str); 3] = [
    ("postgres", "WHIPPET_TEST_PG_PID"),
    ("kafka", "WHIPPET_TEST_KAFKA_PID"),
    ("minio", "WHIPPET_TEST_S3_PID"),
];

/// Processor time of each service, in seconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu([f64; SERVICES.len()]);

/// One process: who started it, and what it and its children that have ended took, in ticks of 10 ms.
struct Process {
    parent: u32,
    own: u64,
    ended: u64,
}

impl Cpu {
    /// What the services, with the processes that they have started, took so far.
    pub fn now() -> anyhow::Result<Cpu> {
        let processes = processes()?;
        let mut seconds = [0.0; SERVICES.len()];
        for ((name, variable), seconds) in SERVICES.iter().zip(&mut seconds) {
            let file = std::env::var(variable)
                .with_context(|| format!("{variable} is not set: run scripts/bench payloads"))?;
            let pid =
                std::fs::read_to_string(&file).with_context(|| format!("{name} does not run: {file}"))?;
            *seconds = ticks(&processes, pid.trim().parse()?) as f64 / 100.0;
        }
        Ok(Cpu(seconds))
    }

    pub fn postgres(&self) -> f64 {
        self.0[0]
    }

    pub fn minio(&self) -> f64 {
        self.0[2]
    }

    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    /// By name.
    pub fn each(&self) -> impl Iterator<Item = (&'static str, f64)> {
        SERVICES.iter().map(|(name, _)| *name).zip(self.0)
    }
}

impl Add for Cpu {
    type Output = Cpu;

    fn add(self, other: Cpu) -> Cpu {
        Cpu(std::array::from_fn(|index| self.0[index] + other.0[index]))
    }
}

impl Sub for Cpu {
    type Output = Cpu;

    fn sub(self, earlier: Cpu) -> Cpu {
        Cpu(std::array::from_fn(|index| self.0[index] - earlier.0[index]))
    }
}

fn processes() -> anyhow::Result<HashMap<u32, Process>> {
    let mut found = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // It may have ended meanwhile.
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        let number =
            |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
        // The first of `fields` is the third: ppid is field 4, utime and stime 14 and 15, of those that ended 16 and 17.
        let (own, ended) = (number(11) + number(12), number(13) + number(14));
        found.insert(pid, Process { parent: number(1) as u32, own, ended });
    }
    Ok(found)
}

fn ticks(processes: &HashMap<u32, Process>, pid: u32) -> u64 {
    let children = processes.iter().filter(|(_, process)| process.parent == pid);
    let children: u64 = children.map(|(child, _)| ticks(processes, *child)).sum();
    processes.get(&pid).map_or(0, |process| process.own + process.ended) + children
}
