"""Prints the Grafana dashboard: `scripts/chart write` puts it where the chart has it.

A row of panels for each question. Each expression has $selector for the variables of the dashboard, so that one
dashboard is for all relays of a Prometheus. src/admin/metrics/described.rs has the metrics; a test sees that every one of
them is on it, and that it names no other.
"""

import json

SELECTOR = 'namespace=~"$namespace", job=~"$job"'
TABLE = SELECTOR + ', table=~"$table"'


def rate(metric, by, more=""):
    return f"sum by ({by}) (rate({metric}{{{TABLE if 'table' in by else SELECTOR}{more}}}[$__rate_interval]))"


def most(metric, by="table", more="", how="max"):
    return f"{how} by ({by}) ({metric}{{{TABLE if 'table' in by else SELECTOR}{more}}})"


def quantiles(metric, by=""):
    labels = f"le, {by}" if by else "le"
    selector = TABLE if "table" in by else SELECTOR
    name = " {{" + by + "}}" if by else ""
    return [
        (f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{{selector}}}[$__rate_interval])))", f"p{int(q * 100)}{name}")
        for q in (0.5, 0.99)
    ]


# Title, unit, [(expression, legend)], and what a reader has to know.
ROWS = [
    ("Is it well?", [
        ("Oldest row that waits", "s", [(most("whippet_oldest_pending_age_seconds"), "{{table}}")], "By the database's clock; held rows apart. What consumers feel when it grows."),
        ("Published", "cps", [(rate("whippet_events_published_total", "table, topic"), "{{table}} → {{topic}}")], "Events that Kafka acknowledged."),
        ("From commit to acknowledgement", "s", quantiles("whippet_end_to_end_seconds", "table"), "From the row's timestamp, by the clock that wrote it."),
        ("Rows that wait", "short", [(most("whippet_pending_events"), "{{table}}")], "Counted up to 100000."),
        ("Last published", "dateTimeFromNow", [(f"1000 * {most('whippet_last_publish_timestamp_seconds')}", "{{table}}")], "An idle table has nothing newer."),
        ("Read, repeats included", "cps", [(rate("whippet_events_read_total", "table"), "{{table}}")], "Much more than published: something is read again and again."),
    ]),
    ("What is held?", [
        ("Held events", "short", [(most("whippet_held_events", "table, cause"), "{{table}}: {{cause}}")], "parked waits for an operator; the others are released by the relay."),
        ("Parked keys and events", "short", [(most("whippet_parked_keys"), "{{table}}: keys"), (most("whippet_parked_events"), "{{table}}: events")], "whippet parked says why."),
        ("Oldest parked", "s", [(most("whippet_oldest_parked_age_seconds"), "{{table}}")], "How long somebody has not looked."),
        ("Dead letters", "cps", [(rate("whippet_events_dead_lettered_total", "table, reason"), "{{table}}: {{reason}}")], "Their headers say why."),
        ("Halted tables", "short", [(most("whippet_table_halted"), "{{table}}")], "1 while a table is halted."),
        ("Headers dropped", "cps", [(rate("whippet_context_dropped_total", "table, reason"), "{{table}}: {{reason}}")], "Of the rows' own."),
    ]),
    ("Kafka", [
        ("From the producer to the acknowledgement", "s", quantiles("whippet_publish_duration_seconds"), "linger included."),
        ("Failures", "cps", [(rate("whippet_publish_failures_total", "table, kind"), "{{table}}: {{kind}}")], "transient ends by itself; rejected is parked or gets a dead letter."),
        ("Retries", "cps", [(rate("whippet_retries_total", "table, kind"), "{{table}}: {{kind}}")], "transient: of an event; source: of the database."),
        ("In flight", "short", [(most("whippet_in_flight_events", "instance"), "{{instance}}")], "Read and not settled: limits.in_flight_events bounds it."),
        ("Bytes in flight", "bytes", [(most("whippet_in_flight_bytes", "instance"), "{{instance}}")], "limits.in_flight_bytes bounds it."),
    ]),
    ("Exactly once", [
        ("Transactions", "cps", [(rate("whippet_transactions_total", "result"), "{{result}}")], "unknown: no answer, and the takeover that follows tells."),
        ("What a commit takes", "s", quantiles("whippet_transaction_commit_seconds"), "From its position to the broker's answer; readers wait for it."),
        ("Events of a transaction", "short", quantiles("whippet_transaction_events"), "Small ones while little is written."),
        ("Takeovers, and those after being fenced", "cps", [(rate("whippet_unit_takeovers_total", "instance"), "{{instance}}"), (rate("whippet_unit_fenced_total", "instance"), "{{instance}}: fenced")], "Fenced again and again: two relays fight for one unit."),
    ]),
    ("The database's log", [
        ("How tables are captured", "short", [(most("whippet_capture_mode", "table, mode"), "{{table}}: {{mode}}")], "/status has the reason (capture_reason)."),
        ("What the server keeps for the slot", "bytes", [(most("whippet_slot_retained_bytes", "namespace, job"), "{{job}}"), (most("whippet_slot_max_retained_bytes", "namespace, job"), "{{job}}: at most")], "Past source.stream.max_retained_wal it is dropped, where every table may be polled."),
        ("What may still be written before the slot is lost", "bytes", [(most("whippet_slot_safe_bytes", "namespace, job", how="min"), "{{job}}")], "Infinite without max_slot_wal_keep_size."),
        ("Slot is read", "short", [(most("whippet_slot_active", "namespace, job"), "{{job}}")], "0 with bytes kept: the disk of the database fills."),
    ]),
    ("Large payloads", [
        ("Payloads encoded, moved or sliced", "cps", [(rate("whippet_offload_total", "table, mode, result"), "{{table}}: {{mode}} {{result}}")], "away and refused are tried again or parked."),
        ("Their bytes", "Bps", [(rate("whippet_offload_bytes_total", "table, mode"), "{{table}}: {{mode}}")], "As they travel or are stored."),
        ("What one takes", "s", quantiles("whippet_offload_duration_seconds"), "Encoding, hashing, moving."),
    ]),
    ("Events by HTTP", [
        ("Taken", "cps", [(rate("whippet_ingest_accepted_total", "instance"), "{{instance}}"), (rate("whippet_ingest_repeated_total", "instance"), "{{instance}}: repeats")], "On the disk when they are answered."),
        ("Refused", "cps", [(rate("whippet_ingest_refused_total", "instance, reason"), "{{instance}}: {{reason}}")], "full, disk, busy and failed are ours, the others the callers'."),
        ("To the answer", "s", quantiles("whippet_ingest_answer_seconds"), "Of those answered with 202."),
        ("A transaction of the spool", "s", quantiles("whippet_ingest_commit_seconds"), "Its fsync included."),
        ("Events of a transaction", "short", quantiles("whippet_ingest_commit_events"), "Callers that wait for one fsync together."),
        ("Spool", "bytes", [(most("whippet_ingest_spool_bytes", "instance"), "{{instance}}"), (most("whippet_ingest_spool_max_bytes", "instance"), "{{instance}}: at most")], "Past it callers get 429."),
        ("Ids remembered", "short", [(most("whippet_ingest_remembered_ids", "instance"), "{{instance}}")], "ingest.dedup says how long."),
    ]),
    ("Relays", [
        ("Share of the work", "short", [(most("whippet_leases_held", "instance, table"), "{{instance}}: {{table}}")], "Buckets of a shared table; 1 for a table that is not shared."),
        ("Relays that know of each other", "short", [(most("whippet_group_members", "instance"), "{{instance}}")], "As each sees it."),
        ("Buckets moved, memberships lost", "cps", [(rate("whippet_leases_moved_total", "instance"), "{{instance}}: moved"), (rate("whippet_memberships_lost_total", "instance"), "{{instance}}: lost")], "Lost again and again: a slow database, or no CPU."),
        ("Takeovers", "s", quantiles("whippet_takeover_seconds"), "Since the last sign of life of who had it."),
        ("Membership", "short", [(most("whippet_membership_epoch", "instance"), "{{instance}}")], "The fencing number; it grows when one joins anew."),
        ("Resident memory", "bytes", [(most("whippet_resident_memory_bytes", "instance"), "{{instance}}")], "At most 40 MiB + 2 × limits.in_flight_bytes + 3 × the largest row."),
        ("Configuration is the one on the disk", "short", [(most("whippet_config_last_reload_success", "instance", how="min"), "{{instance}}")], "0: the new one is wrong, and the old one works on."),
        ("Versions", "short", [(most("whippet_build_info", "instance, version, commit"), "{{instance}}: {{version}} ({{commit}})")], "One line each while they change over."),
    ]),
]

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
WIDTH, HEIGHT, ACROSS = 8, 7, 3


def panel(number, title, unit, targets, description, x, y):
    return {
        "id": number,
        "type": "timeseries",
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": {"x": x, "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0, "custom": {"fillOpacity": 8, "showPoints": "never"}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + at), "datasource": DATASOURCE, "expr": expression, "legendFormat": legend}
            for at, (expression, legend) in enumerate(targets)
        ],
    }


def panels():
    number, y, made = 0, 0, []
    for title, row in ROWS:
        number += 1
        made.append({"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}})
        y += 1
        for at, (name, unit, targets, description) in enumerate(row):
            number += 1
            x = at % ACROSS * WIDTH
            made.append(panel(number, name, unit, targets, description, x, y + at // ACROSS * HEIGHT))
        y += (len(row) + ACROSS - 1) // ACROSS * HEIGHT
    return made


def variable(name, metric, **selected):
    where = ", ".join(f'{label}=~"${label}"' for label in selected.pop("within", ()))
    query = f"label_values({metric}{{{where}}}, {name})"
    return {
        "name": name, "type": "query", "datasource": DATASOURCE, "query": {"query": query, "refId": name}, "definition": query,
        # All is anything, so that a relay shows whose labels a Prometheus without an operator leaves out.
        "includeAll": True, "allValue": ".*", "multi": True, "refresh": 2, "sort": 1, "current": {"text": "All", "value": "$__all"},
    }


dashboard = {
    "uid": "whippet",
    "title": "Whippet",
    "tags": ["whippet", "outbox", "kafka"],
    "schemaVersion": 39,
    "editable": True,
    "refresh": "30s",
    "time": {"from": "now-3h", "to": "now"},
    "templating": {"list": [
        {"name": "datasource", "type": "datasource", "query": "prometheus"},
        variable("namespace", "whippet_build_info"),
        variable("job", "whippet_build_info", within=["namespace"]),
        variable("table", "whippet_events_read_total", within=["namespace", "job"]),
    ]},
    "annotations": {"list": []},
    "panels": panels(),
}
print(json.dumps(dashboard, indent=1, ensure_ascii=False))
