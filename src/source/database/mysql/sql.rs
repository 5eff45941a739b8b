//! Statements with parameters, in the shape that the other driver has: `$1`, `$2`, each as often as it is
//! wanted.
//!
//! They are put in as literals and go over in the text protocol: the server keeps nothing of them, and
//! each value comes back as the text or the bytes that it is. Texts
//! and bytes are written as hexadecimal digits, which mean the same in every SQL mode.

use std::fmt::Write as _;

use futures_util::{FutureExt as _, StreamExt as _, TryStreamExt as _, stream::BoxStream};
use mysql_async::{
    DriverError, Error, Value,
    prelude::{FromRow, FromValue, Query as _, ToConnection},
};
use sqlx::AssertSqlSafe;

use super::pool::Pool;

pub(super) fn quoted(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

/// `database.table` or `table`, quoted part by part.
pub(super) fn quoted_table(name: &str) -> String {
    name.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// A constant text inside a statement.
pub(super) fn literal(text: &str) -> String {
    Literal::Text(text.to_owned()).to_string()
}

/// A value as it is written into a statement.
#[derive(Clone, Debug)]
pub(super) enum Literal {
    Null,
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
}

impl std::fmt::Display for Literal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (introducer, bytes) = match self {
            Literal::Null => return f.write_str("NULL"),
            Literal::Int(number) => return number.fmt(f),
            Literal::Text(text) => ("_utf8mb4 ", text.as_bytes()),
            Literal::Bytes(bytes) => ("", &bytes[..]),
        };
        write!(f, "{introducer}x'")?;
        bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_char('\'')
    }
}

macro_rules! literal_from {
    ($($type:ty => |$value:ident| $literal:expr),* $(,)?) => {
        $(impl From<$type> for Literal {
            fn from($value: $type) -> Literal {
                $literal
            }
        })*
    };
}

literal_from! {
    i64 => |number| Literal::Int(number),
    i32 => |number| Literal::Int(number.into()),
    u32 => |number| Literal::Int(number.into()),
    i16 => |number| Literal::Int(number.into()),
    String => |text| Literal::Text(text),
    &String => |text| Literal::Text(text.clone()),
    &str => |text| Literal::Text(text.to_owned()),
    &[u8] => |bytes| Literal::Bytes(bytes.to_vec()),
    Vec<u8> => |bytes| Literal::Bytes(bytes),
}

impl<T: Into<Literal>> From<Option<T>> for Literal {
    fn from(value: Option<T>) -> Literal {
        value.map_or(Literal::Null, Into::into)
    }
}

/// A statement on its way.
pub(super) struct Query {
    text: String,
    values: Vec<Literal>,
}

pub(super) struct Done {
    affected: u64,
}

impl Done {
    pub fn rows_affected(&self) -> u64 {
        self.affected
    }
}

pub(super) fn query(AssertSqlSafe(text): AssertSqlSafe<&str>) -> Query {
    Query { text: text.to_owned(), values: Vec::new() }
}

impl Query {
    pub fn bind(mut self, value: impl Into<Literal>) -> Query {
        self.values.push(value.into());
        self
    }

    /// The statement with its values. Constants in a statement of ours have no `$`: they are hexadecimal.
    fn render(&self) -> String {
        let mut parts = self.text.split('$');
        let mut text = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let digits = part.len() - part.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            let value =
                part[..digits].parse::<usize>().ok().and_then(|nth| self.values.get(nth.wrapping_sub(1)));
            match value {
                Some(value) => {
                    let _ = write!(text, "{value}{}", &part[digits..]);
                }
                // A name may have one.
                None => {
                    text.push('$');
                    text.push_str(part);
                }
            }
        }
        text
    }

    pub async fn execute<'a, 't: 'a>(
        self,
        connection: impl ToConnection<'a, 't> + 'a,
    ) -> Result<Done, Error> {
        let result = self.render().run(connection).await?;
        let affected = result.affected_rows();
        result.drop_result().await?;
        Ok(Done { affected })
    }

    pub async fn fetch_all<'a, 't: 'a>(
        self,
        connection: impl ToConnection<'a, 't> + 'a,
    ) -> Result<Vec<Row>, Error> {
        self.render().run(connection).await?.map_and_drop(Row).await
    }

    pub async fn fetch_optional<'a, 't: 'a>(
        self,
        connection: impl ToConnection<'a, 't> + 'a,
    ) -> Result<Option<Row>, Error> {
        Ok(self.fetch_all(connection).await?.into_iter().next())
    }
}

/// A row of text and bytes.
pub(super) struct Row(mysql_async::Row);

impl Row {
    pub fn try_get<T: FromValue>(&self, index: usize) -> Result<T, Error> {
        let wrong = |value| Error::Driver(DriverError::FromValue { value });
        match self.0.get_opt(index) {
            Some(Ok(value)) => Ok(value),
            Some(Err(error)) => Err(wrong(error.0)),
            None => Err(wrong(Value::NULL)),
        }
    }

    /// The bytes of a value, without a copy.
    pub fn bytes(&self, index: usize) -> Option<&[u8]> {
        match self.0.as_ref(index) {
            Some(Value::Bytes(bytes)) => Some(bytes),
            _ => None,
        }
    }
}

/// A statement whose rows are tuples, or single values.
pub(super) struct QueryAs<T> {
    query: Query,
    of: std::marker::PhantomData<fn() -> T>,
}

pub(super) fn query_as<T: FromRow + Send + 'static>(text: AssertSqlSafe<&str>) -> QueryAs<T> {
    QueryAs { query: query(text), of: std::marker::PhantomData }
}

pub(super) fn query_scalar<T>(text: AssertSqlSafe<&str>) -> QueryAs<T>
where
    T: FromRow + Send + 'static,
{
    query_as(text)
}

fn typed<T: FromRow>(row: mysql_async::Row) -> Result<T, Error> {
    T::from_row_opt(row).map_err(|error| Error::Driver(DriverError::FromRow { row: error.0 }))
}

impl<T: FromRow + Send + 'static> QueryAs<T> {
    pub fn bind(mut self, value: impl Into<Literal>) -> QueryAs<T> {
        self.query = self.query.bind(value);
        self
    }

    pub async fn fetch_all<'a, 't: 'a>(
        self,
        connection: impl ToConnection<'a, 't> + 'a,
    ) -> Result<Vec<T>, Error> {
        self.query.fetch_all(connection).await?.into_iter().map(|row| typed(row.0)).collect()
    }

    pub async fn fetch_optional<'a, 't: 'a>(
        self,
        connection: impl ToConnection<'a, 't> + 'a,
    ) -> Result<Option<T>, Error> {
        self.query.fetch_optional(connection).await?.map(|row| typed(row.0)).transpose()
    }

    pub async fn fetch_one<'a, 't: 'a>(self, connection: impl ToConnection<'a, 't> + 'a) -> Result<T, Error> {
        let none = || Error::Other("the statement returned no row".into());
        self.fetch_optional(connection).await?.ok_or_else(none)
    }

    /// Row by row, as they come.
    pub fn fetch(self, pool: &Pool) -> BoxStream<'_, Result<T, Error>> {
        async move {
            let connection = pool.get_conn().await?;
            let rows = self.query.render().stream::<mysql_async::Row, _>(connection).await?;
            Ok::<_, Error>(rows.and_then(async |row| typed(row)))
        }
        .into_stream()
        .try_flatten()
        .boxed()
    }
}

/// A transaction that may be written to through `&mut *it`, as the other driver's.
pub(super) struct Tx(mysql_async::Transaction<'static>);

impl Tx {
    pub async fn begin(pool: &Pool) -> Result<Tx, Error> {
        pool.start_transaction(mysql_async::TxOpts::default()).await.map(Tx)
    }

    pub async fn commit(self) -> Result<(), Error> {
        self.0.commit().await
    }

    pub async fn rollback(self) -> Result<(), Error> {
        self.0.rollback().await
    }
}

impl std::ops::Deref for Tx {
    type Target = mysql_async::Transaction<'static>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl std::ops::DerefMut for Tx {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_written_where_they_are_wanted_and_cannot_break_out() {
        let text = query(AssertSqlSafe("SELECT $2, `a$b`, $1 FROM `c$` WHERE $2 = $3 AND $10"))
            .bind("it's \\")
            .bind(7_i64)
            .bind(None::<&[u8]>)
            .render();
        assert_eq!(text, "SELECT 7, `a$b`, _utf8mb4 x'69742773205c' FROM `c$` WHERE 7 = NULL AND $10");
        assert_eq!(query(AssertSqlSafe("$1")).bind(&b"\0'"[..]).render(), "x'0027'");
        assert_eq!(quoted_table("shop.a`; drop"), "`shop`.`a``; drop`");
        assert_eq!(literal(""), "_utf8mb4 x''");
    }
}
