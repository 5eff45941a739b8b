//! From a file to a [`Config`], step by step.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use super::{
    Config, Error, Place, Problem, Secret, Table, change::Given, check, error::Problems, ingest, interpolate,
    later, layers, shape, tables, yaml,
};
use crate::record::Template;

/// Reads a file, under the environment of this process.
pub fn load(path: &Path) -> Result<Config, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    let text = String::from_utf8(bytes).map_err(|error| not_utf8(path, &error))?;
    // A variable that is not UTF-8 cannot be one of ours.
    let env = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    parse(&path.display().to_string(), &text, &env)
}

fn not_utf8(path: &Path, error: &std::string::FromUtf8Error) -> Error {
    let good = &error.as_bytes()[..error.utf8_error().valid_up_to()];
    let line = good.split(|byte| *byte == b'\n');
    let column = String::from_utf8_lossy(line.clone().next_back().unwrap_or_default()).chars().count();
    let at = Some((line.count() as u64, column as u64 + 1));
    let place = Place::File { name: path.display().to_string(), at };
    let message = "expected UTF-8; this byte belongs to another encoding".to_owned();
    Error::Invalid(vec![Problem { place, path: String::new(), message }])
}

/// Reads the text of a file called `name` in messages.
pub fn parse(name: &str, text: &str, env: &BTreeMap<String, String>) -> Result<Config, Error> {
    let (mut tree, places) = yaml::read(name, text)?;
    let mut problems = Problems::new(places);
    let overrides = layers::overrides(env, &mut problems);
    let [properties, options] = ["kafka.properties", "object_store.options"]
        .map(|key| interpolate::recipes(&tree, key, env, &problems));
    interpolate::apply(&mut tree, env, &mut problems);
    let mut tree = layers::merge(tree, overrides, &mut problems);
    let has_spool = ingest::add_table(&mut tree, &mut problems);
    let explicit = tables::fill_in(&mut tree, &mut problems);
    later::refuse(&mut tree, &mut problems);
    let shaped = shape::shape(tree, &shape::schema(), &mut problems);
    // What the schema lets through deserializes; were it not so, that is a problem too.
    let given = Given(shaped.clone().unwrap_or_default());
    let mut config = shaped.and_then(|shaped| {
        serde_json::from_value::<Config>(shaped).map_err(|error| problems.add("", error.to_string())).ok()
    });
    if let Some(config) = &mut config {
        follow_files(&mut config.kafka.properties, properties);
        if let Some(store) = &mut config.object_store {
            follow_files(&mut store.options, options);
        }
        for (table, explicit) in config.tables.iter_mut().zip(&explicit) {
            table.columns.required = required(table, explicit);
        }
        config.spool = has_spool.then(|| ingest::take_table(config)).flatten();
        check::check(config, &mut problems);
    }
    let (mut config, warnings) = problems.finish(config)?;
    config.warnings = warnings;
    config.given = given;
    Ok(config)
}

/// Lets values that came from files be read again.
fn follow_files(secrets: &mut BTreeMap<String, Secret>, recipes: BTreeMap<String, interpolate::Recipe>) {
    for (name, recipe) in recipes {
        if let Some(secret) = secrets.get_mut(&name) {
            *secret = std::mem::take(secret).made_by(recipe);
        }
    }
}

/// The columns without which a table cannot be relayed as configured: those that the user named,
/// and those that every event needs. A preset's others may be missing, as if they were NULL.
fn required(table: &Table, explicit: &BTreeSet<String>) -> BTreeSet<String> {
    let columns = &table.columns;
    let by_role = columns.by_role();
    let named = by_role.iter().filter(|(role, _)| explicit.contains(*role)).map(|(_, name)| *name);
    let templates = [&table.topic, &table.key].into_iter().flatten();
    let templates: Vec<Template> = templates.filter_map(|source| Template::parse(source).ok()).collect();
    let routed = columns.topic.as_ref().filter(|_| table.topic.is_none());
    [&columns.id, &columns.payload]
        .into_iter()
        .chain(&columns.sequence)
        .chain(table.marked())
        .chain(table.kept_by())
        .chain(routed)
        .chain(&table.headers.from)
        .chain(table.headers.columns.iter().map(|(_, column)| column))
        .map(String::as_str)
        .chain(named)
        .chain(templates.iter().flat_map(|template| template.columns()))
        .map(str::to_owned)
        .collect()
}
