//! The tables as the verbs see them, and how a verb is carried out: by the source of each table that it is for, all at
//! once. One that cannot be reached is no reason for the others to wait, and the answer says of each what became of it.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use futures_util::future::join_all;
use serde::Serialize;
use tokio::{sync::mpsc::WeakUnboundedSender, time::timeout};

use crate::{
    config::{AfterPublish, Order},
    coordinate::report,
    http::Problem,
    source::{
        Asked, Command, Refusal,
        database::{Database, TableSpec, answered},
        hold::{Filter, Held, Outcome, Request, Scope, Verb},
    },
};

/// How long a verb may take. In a third of it it has to begin, or is taken back.
const WITHIN: Duration = Duration::from_mins(1);

/// A table as the verbs see it.
pub struct Table {
    pub spec: TableSpec,
    /// Where it is.
    pub database: Database,
    /// To its source; weak, because the channel's end tells the source to finish.
    pub source: WeakUnboundedSender<Command>,
}

/// What the verbs need.
pub struct Desk {
    /// They come and go.
    tables: Mutex<Vec<Arc<Table>>>,
    token_file: Option<PathBuf>,
}

/// What is told of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Told {
    pub table: String,
    pub detail: String,
}

/// What a verb did, or would do.
#[derive(Debug, Serialize)]
pub(super) struct Done {
    dry_run: bool,
    keys: u64,
    events: u64,
    tables: Vec<DoneInTable>,
    /// Tables for which it was not carried out, and why.
    failed: Vec<Told>,
    /// Tables that it is not for.
    left_out: Vec<Told>,
}

#[derive(Debug, Serialize)]
struct DoneInTable {
    table: String,
    #[serde(flatten)]
    outcome: Outcome,
}

/// With 207 where it is not the answer of every table that was asked.
pub(super) struct Answer<T>(pub T);

/// Of which tables an answer says nothing.
pub(super) trait Partial {
    fn failed(&self) -> &[Told];
}

impl Partial for Done {
    fn failed(&self) -> &[Told] {
        &self.failed
    }
}

impl<T: Partial + Serialize> IntoResponse for Answer<T> {
    fn into_response(self) -> Response {
        let code = if self.0.failed().is_empty() { StatusCode::OK } else { StatusCode::MULTI_STATUS };
        (code, Json(self.0)).into_response()
    }
}

/// Each with the name of its table.
type Named<T> = Vec<(String, T)>;

/// What tables answered, and why others did not; a problem, where none did.
fn gather<T>(answers: Named<Result<T, Problem>>) -> Result<(Named<T>, Vec<Told>), Problem> {
    let (mut good, mut problems) = (Vec::new(), Vec::new());
    for (table, answer) in answers {
        match answer {
            Ok(answer) => good.push((table, answer)),
            Err(problem) => problems.push((table, problem)),
        }
    }
    if good.is_empty()
        && let Some((_, first)) = problems.first()
    {
        if problems.len() == 1 {
            return Err(problems.remove(0).1);
        }
        let is_common = problems.iter().all(|(_, problem)| problem.code == first.code);
        let code = if is_common { first.code } else { StatusCode::SERVICE_UNAVAILABLE };
        let details = problems.into_iter().map(|(table, problem)| problem.of(&table).detail);
        return Err(Problem::new(code, details.collect::<Vec<_>>().join("\n")));
    }
    let told = problems.into_iter().map(|(table, Problem { detail, .. })| Told { table, detail });
    Ok((good, told.collect()))
}

impl Desk {
    pub fn new(token_file: Option<PathBuf>) -> Desk {
        Desk { tables: Mutex::default(), token_file }
    }

    pub(super) fn token_file(&self) -> Option<&Path> {
        self.token_file.as_deref()
    }

    /// In the place of the one of its name, which is there until then: a verb that comes while a table starts again must
    /// not pass it by.
    pub fn add(&self, table: Table) {
        let mut tables = self.tables();
        match tables.iter_mut().find(|known| known.spec.name == table.spec.name) {
            Some(known) => *known = Arc::new(table),
            None => tables.push(Arc::new(table)),
        }
    }

    pub fn remove(&self, name: &str) {
        self.tables().retain(|table| table.spec.name != name);
    }

    fn tables(&self) -> MutexGuard<'_, Vec<Arc<Table>>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table of this name, or all of them.
    fn chosen(&self, name: Option<&str>) -> Result<Vec<Arc<Table>>, Problem> {
        let tables = self.tables();
        let Some(name) = name else { return Ok(tables.clone()) };
        match tables.iter().find(|table| table.spec.name == name) {
            Some(table) => Ok(vec![table.clone()]),
            None => {
                let detail = format!("no table {name:?} is configured; there is {}", names(&tables));
                Err(Problem::new(StatusCode::NOT_FOUND, detail))
            }
        }
    }

    /// What is held, of each table that can be asked.
    pub(super) async fn list(
        &self,
        table: Option<&str>,
        filter: &Filter,
        limit: i64,
        payload: bool,
    ) -> Result<(Vec<Vec<Held>>, Vec<Told>), Problem> {
        let chosen = self.chosen(table)?;
        let lists = join_all(chosen.iter().map(|table| table.list(filter, limit, payload))).await;
        let named = chosen.iter().map(|table| table.spec.name.clone()).zip(lists).collect();
        let (lists, failed) = gather(named)?;
        Ok((lists.into_iter().map(|(_, held)| held).collect(), failed))
    }

    pub(super) async fn carry_out(
        &self,
        table: Option<&str>,
        request: Request,
    ) -> Result<Answer<Done>, Problem> {
        let chosen = self.chosen(table)?;
        match &request.verb {
            Verb::Replay(_) if chosen.len() > 1 => replay(chosen, request).await,
            Verb::Pause(scope) if *scope != Scope::Table => {
                let (one_lane, fit): (Vec<_>, Vec<_>) =
                    chosen.into_iter().partition(|table| table.spec.order == Order::Table);
                let left_out = one_lane.iter().map(|table| {
                    let name = &table.spec.name;
                    let detail = format!("table {name} is one lane (order: table): pause all of it");
                    Told { table: name.clone(), detail }
                });
                let left_out: Vec<Told> = left_out.collect();
                match left_out.first() {
                    Some(first) if fit.is_empty() => Err(Problem::bad(first.detail.clone())),
                    _ => Ok(Answer(Done { left_out, ..in_each(&fit, &request, WITHIN).await? })),
                }
            }
            _ => in_each(&chosen, &request, WITHIN).await.map(Answer),
        }
    }
}

fn names(tables: &[Arc<Table>]) -> String {
    tables.iter().map(|table| table.spec.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// In all of these tables at once.
async fn in_each(tables: &[Arc<Table>], request: &Request, within: Duration) -> Result<Done, Problem> {
    let outcomes =
        join_all(tables.iter().map(|table| carry_out(&table.source, request.clone(), within))).await;
    let named = tables.iter().map(|table| table.spec.name.clone()).zip(outcomes).collect();
    let (outcomes, failed) = gather(named)?;
    Ok(Done {
        dry_run: request.dry_run,
        keys: outcomes.iter().map(|(_, outcome)| outcome.keys).sum(),
        events: outcomes.iter().map(|(_, outcome)| outcome.events).sum(),
        tables: outcomes.into_iter().map(|(table, outcome)| DoneInTable { table, outcome }).collect(),
        failed,
        left_out: Vec::new(),
    })
}

/// No table is named. It is the one that keeps what is published, or, of several, the one that has the ids.
async fn replay(tables: Vec<Arc<Table>>, request: Request) -> Result<Answer<Done>, Problem> {
    let keeps = |table: &&Arc<Table>| table.spec.after_publish != AfterPublish::Delete;
    let keepers: Vec<Arc<Table>> = tables.iter().filter(keeps).cloned().collect();
    let has_ids_only =
        matches!(&request.verb, Verb::Replay(which) if which.sequences.or(which.times).is_none());
    match keepers.len() {
        // They say why not.
        0 => return in_each(&tables, &request, WITHIN).await.map(Answer),
        1 => return in_each(&keepers, &request, WITHIN).await.map(Answer),
        _ if has_ids_only => {}
        _ => {
            return Err(Problem::bad(format!("say which table: {} keep what is published", names(&keepers))));
        }
    }
    let found = in_each(&keepers, &Request { dry_run: true, ..request.clone() }, WITHIN / 3).await?;
    let with_ids = found.tables.iter().filter(|table| table.outcome.events > 0);
    let with_ids: Vec<&str> = with_ids.map(|table| table.table.as_str()).collect();
    match with_ids[..] {
        [] => Ok(Answer(Done { dry_run: request.dry_run, ..found })),
        [name] => {
            let one: Vec<Arc<Table>> =
                keepers.iter().filter(|table| table.spec.name == name).cloned().collect();
            Ok(Answer(Done { failed: found.failed, ..in_each(&one, &request, WITHIN * 2 / 3).await? }))
        }
        _ => Err(Problem::bad(format!("say which table: {} have these ids", with_ids.join(" and ")))),
    }
}

impl Table {
    async fn list(&self, filter: &Filter, limit: i64, payload: bool) -> Result<Vec<Held>, Problem> {
        let listed = async {
            let outbox = self.database.outbox(&self.spec).await?;
            let mut listed = outbox.list(filter, limit).await?;
            if payload {
                for held in &mut listed {
                    held.payload = Some(outbox.payload_text(&held.place).await?);
                }
            }
            Ok(listed)
        };
        let listed = answered("list what is held", listed).await;
        listed.map_err(|error| Problem::new(StatusCode::SERVICE_UNAVAILABLE, report(&error)))
    }
}

/// Has the source of a table carry out a verb. What the answer says is so, or it says that it is not known.
async fn carry_out(
    source: &WeakUnboundedSender<Command>,
    request: Request,
    within: Duration,
) -> Result<Outcome, Problem> {
    let unavailable = |detail: &str| Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail);
    let stops = "the relay is stopping, or the table starts again: nothing was changed";
    let (asked, mut answer) = Asked::new(request);
    if source.upgrade().is_none_or(|source| source.send(Command::Verb(asked)).is_err()) {
        return Err(unavailable(stops));
    }
    let mut told = timeout(within / 3, &mut answer.outcome).await;
    if !matches!(told, Ok(Ok(_))) && answer.take_back() {
        let late = "the table did not get to it in time, and will not: nothing was changed; see /status";
        return Err(unavailable(if told.is_err() { late } else { stops }));
    }
    if told.is_err() {
        told = timeout(within * 2 / 3, &mut answer.outcome).await;
    }
    let refusal = match told {
        Ok(Ok(Ok(outcome))) => return Ok(outcome),
        Ok(Ok(Err(refusal))) => refusal,
        Ok(Err(_)) => Refusal::Unknown("the relay stopped while it was carried out".into()),
        Err(_) => Refusal::Unknown("it has begun and not ended in time".into()),
    };
    let code = match refusal {
        Refusal::NotOwner => StatusCode::CONFLICT,
        Refusal::Wrong(_) => StatusCode::BAD_REQUEST,
        Refusal::Failed(_) | Refusal::Unknown(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    Err(Problem::new(code, refusal.to_string()))
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    fn request() -> Request {
        let verb = Verb::Redrive(Filter::default());
        Request { verb, dry_run: false, who: "tester".into(), why: None }
    }

    fn asked(command: Option<Command>) -> Asked {
        let Some(Command::Verb(asked)) = command else { panic!("{command:?}") };
        asked
    }

    #[tokio::test(start_paused = true)]
    async fn a_verb_that_was_said_not_to_happen_does_not_happen() {
        let (source, mut commands) = mpsc::unbounded_channel();
        let problem = carry_out(&source.downgrade(), request(), WITHIN).await.unwrap_err();
        assert_eq!(problem.code, StatusCode::SERVICE_UNAVAILABLE);
        assert!(problem.detail.contains("nothing was changed"), "{}", problem.detail);
        assert!(asked(commands.recv().await).begin().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_has_begun_is_not_said_to_be_taken_back() {
        let (source, mut commands) = mpsc::unbounded_channel();
        for (takes, happens) in [(WITHIN / 2, true), (WITHIN * 2, false)] {
            let weak = source.downgrade();
            let carried_out = tokio::spawn(async move { carry_out(&weak, request(), WITHIN).await });
            let (_, answer) = asked(commands.recv().await).begin().unwrap();
            tokio::time::sleep(takes).await;
            answer.send(Ok(Outcome { keys: 1, events: 2 })).ok();
            match carried_out.await.unwrap() {
                Ok(outcome) => assert!(happens && outcome.events == 2),
                Err(problem) => assert!(!happens && problem.detail.contains("carried out or not")),
            }
        }
    }

    #[tokio::test]
    async fn a_relay_that_stops_says_whether_it_had_begun() {
        for (begins, says) in [(false, "nothing was changed"), (true, "carried out or not")] {
            let (source, mut commands) = mpsc::unbounded_channel();
            let weak = source.downgrade();
            let carried_out = tokio::spawn(async move { carry_out(&weak, request(), WITHIN).await });
            let asked = asked(commands.recv().await);
            match begins {
                true => drop(asked.begin()),
                false => drop(asked),
            }
            let problem = carried_out.await.unwrap().unwrap_err();
            assert!(problem.detail.contains(says), "{}", problem.detail);
        }
        let (source, commands) = mpsc::unbounded_channel();
        drop(commands);
        assert!(carry_out(&source.downgrade(), request(), WITHIN).await.is_err());
    }

    #[test]
    fn tables_that_answer_are_an_answer_and_else_there_is_one_problem() {
        let good = |table: &str| (table.to_owned(), Ok(1));
        let bad = |table: &str, code| (table.to_owned(), Err(Problem::new(code, format!("{table} is away"))));
        let (lost, wrong) = (StatusCode::SERVICE_UNAVAILABLE, StatusCode::BAD_REQUEST);
        let (answers, failed) = gather(vec![bad("a", lost), good("b")]).unwrap();
        assert_eq!(answers, [("b".to_owned(), 1)]);
        assert_eq!(failed, [Told { table: "a".into(), detail: "a is away".into() }]);
        for (answers, code, detail) in [
            (vec![bad("a", wrong)], wrong, "a is away"),
            (vec![bad("a", wrong), bad("b", wrong)], wrong, "a: a is away\nb: b is away"),
            (vec![bad("a", wrong), bad("b", lost)], lost, "a: a is away\nb: b is away"),
        ] {
            let problem = gather::<u8>(answers).unwrap_err();
            assert_eq!((problem.code, problem.detail.as_str()), (code, detail));
        }
    }
}
