//! What `whippet doctor` finds of a spool. Nothing is left behind, and a relay that runs is not disturbed.

use std::path::Path;

use super::{spool::is_ours_to_take, volume, writer::free_bytes};
use crate::{
    config::Ingest,
    doctor::{Finding, Fix},
};

const SPOOL: &str = "ingest: spool";

pub fn check(ingest: &Ingest) -> Vec<Finding> {
    let folder = &ingest.spool;
    let shown = folder.display();
    let mut findings = Vec::new();
    // What is not there yet is made at the start, in what is there.
    let there = folder.ancestors().find(|folder| folder.exists()).unwrap_or(Path::new("."));
    if let Err(error) = tempfile::tempfile_in(there) {
        let fix = Fix::Config("ingest.spool: (a folder that this user may write to)".into());
        let says = format!("{} cannot be written to: {error}", there.display());
        return vec![Finding::fail(SPOOL, says).mended_by(fix)];
    }
    if let Some(why) = volume::passing(there) {
        findings.push(Finding::warn("ingest: volume", format!("{shown}: {why}")));
    }
    match free_bytes(there) {
        Ok(free) if free < ingest.max_bytes as u64 => findings.push(Finding::warn(
            "ingest: disk",
            format!(
                "{} MiB are free, less than ingest.max_bytes: events will be refused because the disk is full (507) \
                 before the spool is (429)",
                free >> 20
            ),
        )),
        Ok(free) => findings.push(Finding::ok("ingest: disk", format!("{} MiB are free", free >> 20))),
        Err(error) => {
            findings.push(Finding::warn("ingest: disk", format!("how much is free is not known: {error}")));
        }
    }
    findings.push(match is_ours_to_take(folder) {
        Ok(true) => Finding::ok(SPOOL, format!("{shown} can be written to, and no process uses it")),
        Ok(false) => Finding::ok(SPOOL, format!("{shown} can be written to, and a process uses it")),
        Err(error) => {
            let fix = Fix::Shell(format!("chmod -R u+rw '{shown}'"));
            Finding::fail(SPOOL, format!("{error:#}")).mended_by(fix)
        }
    });
    findings
}
