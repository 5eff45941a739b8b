//! `doctor`: connects, tries everything, and says how to mend what is wrong.

use std::path::Path;

use super::{BAD_CONFIG, DONE, FAILED, print, run::runtime};
use crate::{
    config,
    doctor::{self, Finding, Verdict},
};

pub fn doctor(path: &Path, json: bool) -> u8 {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return BAD_CONFIG;
        }
    };
    let findings = match runtime() {
        Ok(runtime) => runtime.block_on(doctor::examine(&config)),
        Err(error) => {
            eprintln!("cannot start: {error}");
            return FAILED;
        }
    };
    match json {
        true => print(&format!("{:#}\n", serde_json::json!(findings))),
        false => findings.iter().for_each(|finding| print(&line(finding))),
    }
    if findings.iter().any(Finding::is_fail) { FAILED } else { DONE }
}

fn line(finding: &Finding) -> String {
    let verdict = match finding.verdict {
        Verdict::Ok => "ok  ",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let mut text = format!("{verdict}  {}: {}\n", finding.check, finding.says);
    if let Some(fix) = &finding.fix {
        // A statement may have lines of its own.
        for line in fix.text().lines() {
            text.push_str(&format!("      {line}\n"));
        }
    }
    text
}
