//! `${VAR}`, `${VAR:-default}` and `${file:PATH}` inside scalar values of the file.
//!
//! `$${` is a literal `${`; any other `$` stands for itself.

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc};

use serde_json::Value;

use super::error::{Problems, join};

/// Replaces every reference in `tree`. What an environment variable overrides is left alone: it is
/// not going to be read, so it need not resolve.
pub(super) fn apply(tree: &mut Value, env: &BTreeMap<String, String>, problems: &mut Problems) {
    walk(tree, "", env, problems);
}

fn walk(value: &mut Value, path: &str, env: &BTreeMap<String, String>, problems: &mut Problems) {
    if problems.places.variables.contains_key(path) {
        return;
    }
    match value {
        Value::String(text) if text.contains("${") => match resolve(text, env) {
            Ok(resolved) => {
                *text = resolved;
                problems.places.hidden.insert(path.to_owned());
            }
            Err(message) => {
                problems.add(path, message);
                *value = Value::Null;
            }
        },
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                walk(item, &format!("{path}[{index}]"), env, problems);
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                walk(value, &join(path, key), env, problems);
            }
        }
        _ => {}
    }
}

/// What a value is made of that has files in it, so that they can be read again.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Recipe(Arc<Vec<Part>>);

#[derive(PartialEq, Eq)]
enum Part {
    Text(String),
    File(PathBuf),
}

/// Its texts may be secrets.
impl fmt::Debug for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recipe")
    }
}

impl Recipe {
    /// The value, with the files as they are now.
    pub fn read(&self) -> Result<String, String> {
        let text = |part: &Part| match part {
            Part::Text(text) => Ok(text.clone()),
            Part::File(path) => read(path),
        };
        self.0.iter().map(text).collect()
    }
}

/// The recipes of the values directly below `key`, such as `kafka.properties`: of those that have files in them and are
/// not overridden. Errors are for [`apply`] to tell.
pub(super) fn recipes(
    tree: &Value,
    key: &str,
    env: &BTreeMap<String, String>,
    problems: &Problems,
) -> BTreeMap<String, Recipe> {
    let below = key.split('.').try_fold(tree, |value, level| value.get(level)).and_then(Value::as_object);
    let recipe = |(name, value): (&String, &Value)| {
        let overridden = problems.places.variables.contains_key(&join(key, name));
        let parts = parts(value.as_str().filter(|_| !overridden)?, env).ok()?;
        let has_file = parts.iter().any(|part| matches!(part, Part::File(_)));
        has_file.then(|| (name.clone(), Recipe(Arc::new(parts))))
    };
    below.into_iter().flatten().filter_map(recipe).collect()
}

/// `text` with its references replaced.
fn resolve(text: &str, env: &BTreeMap<String, String>) -> Result<String, String> {
    Recipe(Arc::new(parts(text, env)?)).read()
}

/// `text` with its references replaced, but for files.
fn parts(text: &str, env: &BTreeMap<String, String>) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find("${") {
        if rest[..start].ends_with('$') {
            out.push_str(&rest[..start - 1]);
            out.push_str("${");
            rest = &rest[start + 2..];
            continue;
        }
        out.push_str(&rest[..start]);
        let inner = &rest[start + 2..];
        let end = inner.find('}').ok_or("`${` without `}`; write `$${` for the characters themselves")?;
        match inner[..end].strip_prefix("file:") {
            Some(path) => {
                parts.push(Part::Text(std::mem::take(&mut out)));
                parts.push(Part::File(path.into()));
            }
            None => out.push_str(&lookup(&inner[..end], env)?),
        }
        rest = &inner[end + 1..];
    }
    out.push_str(rest);
    parts.push(Part::Text(out));
    Ok(parts)
}

fn read(path: &PathBuf) -> Result<String, String> {
    let text = std::fs::read_to_string(path)
        .map_err(|error| format!("`${{file:{}}}` cannot be resolved: {error}", path.display()))?;
    // An editor or `echo` ends the file with a newline that is no part of the secret.
    Ok(text.strip_suffix('\n').map_or(&*text, |t| t.strip_suffix('\r').unwrap_or(t)).to_owned())
}

/// What stands between `${` and `}`.
fn lookup(reference: &str, env: &BTreeMap<String, String>) -> Result<String, String> {
    let (name, default) = match reference.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (reference, None),
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if name.is_empty() || !name.chars().all(legal) || name.starts_with(|c: char| c.is_ascii_digit()) {
        return Err(format!("`${{{name}}}` is not ${{VAR}}, ${{VAR:-default}} or ${{file:PATH}}"));
    }
    match (env.get(name), default) {
        (Some(value), None) => Ok(value.clone()),
        // As in a shell: an empty variable takes the default too.
        (Some(value), Some(_)) if !value.is_empty() => Ok(value.clone()),
        (_, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!("`${{{name}}}` cannot be resolved: the variable is not set")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_replaced_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, "from file\n").unwrap();
        let env = BTreeMap::from([("A", "1"), ("EMPTY", "")].map(|(k, v)| (k.into(), v.into())));
        let resolve = |text: &str| resolve(text, &env);
        for (text, expected) in [
            ("a${A}b${A}", "a1b1"),
            ("${A:-x}", "1"),
            ("${B:-x y}", "x y"),
            ("${B:-}", ""),
            ("${EMPTY}", ""),
            ("${EMPTY:-x}", "x"),
            ("$${A} ${A}", "${A} 1"),
            ("$A $ {A} 5$", "$A $ {A} 5$"),
        ] {
            assert_eq!(resolve(text).as_deref(), Ok(expected), "{text}");
        }
        assert_eq!(resolve(&format!("<${{file:{}}}>", file.display())).as_deref(), Ok("<from file>"));
        for (text, expected) in [
            ("${B}", "`${B}` cannot be resolved: the variable is not set"),
            ("${A", "`${` without `}`; write `$${` for the characters themselves"),
            ("${}", "`${}` is not ${VAR}, ${VAR:-default} or ${file:PATH}"),
            ("${a b}", "`${a b}` is not ${VAR}, ${VAR:-default} or ${file:PATH}"),
            (
                "${file:nowhere}",
                "`${file:nowhere}` cannot be resolved: No such file or directory (os error 2)",
            ),
        ] {
            assert_eq!(resolve(text).unwrap_err(), expected, "{text}");
        }
    }
}
