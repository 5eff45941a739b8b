//! Where the tokens of OAUTHBEARER come from: of several ways exactly one.

use super::{Kafka, error::Problems};

const MECHANISM: &str = "OAUTHBEARER";

pub(super) fn check(kafka: &Kafka, problems: &mut Problems) {
    let property = |name: &str| kafka.properties.get(name).map_or("", |value| value.expose());
    let is = |name: &str, value: &str| property(name).eq_ignore_ascii_case(value);
    let names = ["sasl.mechanisms", "sasl.mechanism"];
    let mechanism = names.into_iter().find(|name| is(name, MECHANISM));
    // librdkafka makes them: of an issuer's, or ones that nobody has signed.
    let made = [("sasl.oauthbearer.method", "oidc"), ("enable.sasl.oauthbearer.unsecure.jwt", "true")];
    let made = made.into_iter().find(|(name, value)| is(name, value));
    let key = match (&kafka.token_file, kafka.token_command.as_slice()) {
        (None, []) => {
            if let (Some(mechanism), None) = (mechanism, made) {
                problems.add(
                    &format!("kafka.properties.{mechanism}"),
                    "there is no token to log in with: set kafka.token_file or kafka.token_command, or \
                     sasl.oauthbearer.method: oidc",
                );
            }
            return;
        }
        (Some(_), [_, ..]) => {
            problems.add("kafka.token_command", "token_file has it already; expected one of them");
            return;
        }
        (Some(_), []) => "kafka.token_file",
        (None, _) => "kafka.token_command",
    };
    if let Some(file) = &kafka.token_file {
        if file.as_os_str().is_empty() || file.is_dir() {
            problems.add(key, "expected a file");
        } else if !file.is_file() {
            problems.warn(key, &format!("there is no file {} (yet)", file.display()));
        }
    }
    if let Some((name, value)) = made {
        problems.add(key, format!("with {name}: {value} librdkafka makes the tokens; expected one of them"));
    } else if mechanism.is_none() {
        problems.add(key, "a token is for OAUTHBEARER: set sasl.mechanisms: OAUTHBEARER in kafka.properties");
    } else if !property("security.protocol").to_ascii_lowercase().starts_with("sasl_") {
        problems.add(key, "nobody asks for a token: set security.protocol: SASL_SSL in kafka.properties");
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use crate::config::parse;

    fn problem(kafka: &str) -> Option<String> {
        let yaml = format!(
            "source: {{ url: 'sqlite:///x.db' }}\nkafka: {{ bootstrap_servers: 'k:1', {kafka} }}\ntables: [{{ name: o }}]\n"
        );
        parse("test", &yaml, &BTreeMap::new()).err().map(|error| error.to_string())
    }

    #[test]
    fn exactly_one_way_leads_to_a_token() {
        const SASL: &str = "properties: { security.protocol: SASL_SSL, sasl.mechanisms: OAUTHBEARER";
        let with = |more: &str| problem(&format!("{SASL}{more}"));
        for fine in [
            " }, token_file: /run/secrets/token",
            " }, token_command: [print-token]",
            ", sasl.oauthbearer.method: OIDC }",
            ", enable.sasl.oauthbearer.unsecure.jwt: true }",
        ] {
            assert_eq!(with(fine), None, "{fine}");
        }
        for (wrong, says) in [
            (" }", "there is no token to log in with: set kafka.token_file or kafka.token_command"),
            (", sasl.oauthbearer.method: default }", "there is no token to log in with"),
            (" }, token_file: /t, token_command: [x]", "token_file has it already"),
            (" }, token_file: /", "expected a file"),
            (
                ", sasl.oauthbearer.method: oidc }, token_file: /t",
                "sasl.oauthbearer.method: oidc librdkafka makes",
            ),
            (
                ", enable.sasl.oauthbearer.unsecure.jwt: 'true' }, token_command: [x]",
                "librdkafka makes the tokens",
            ),
        ] {
            let problem = with(wrong).unwrap();
            assert!(problem.contains(says), "{wrong}: {problem}");
        }
        let plain = "properties: { sasl.mechanism: OAUTHBEARER }, token_command: [x]";
        for (wrong, says) in
            [("token_command: [x]", "a token is for OAUTHBEARER"), (plain, "set security.protocol: SASL_SSL")]
        {
            let problem = problem(wrong).unwrap();
            assert!(problem.contains(says), "{wrong}: {problem}");
        }
    }
}
