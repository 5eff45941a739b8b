"""python3 -m unittest discover clients/python/tests: nothing has to be installed."""

import base64
import gzip
import io
import json
import pathlib
import random
import sys
import tempfile
import tracemalloc
import unittest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import whippet_reader  # noqa: E402
from whippet_reader import Reader, ReadError, chunk_id  # noqa: E402

VECTORS = json.loads((HERE.parents[2] / "tests/fixtures/large-payloads.json").read_text())


def decoded(text):
    return None if text is None else base64.b64decode(text)


def record(given):
    headers = [
        (name, value.encode() if isinstance(value, str) else decoded(value["base64"])) for name, value in given["headers"]
    ]
    return given["key"].encode(), decoded(given["value"]), headers


def fetcher(objects):
    def fetch(uri, at_most):
        if uri not in objects:
            raise ReadError("store", f"there is no object {uri}")
        return whippet_reader._bounded(uri, decoded(objects[uri]), at_most)

    return fetch


def chunks(event, payload, size, key=b"k"):
    sha256 = whippet_reader.hashlib.sha256(payload).hexdigest()
    slices = [payload[at:at + size] for at in range(0, len(payload), size)] or [b""]
    for index, part in enumerate(slices):
        headers = {
            "id": event, "whippet-chunk-id": chunk_id(event, size, sha256), "whippet-chunk-index": index,
            "whippet-chunk-count": len(slices), "whippet-chunk-size": len(payload), "whippet-chunk-sha256": sha256,
        }
        yield key, part, [(name, str(value).encode()) for name, value in headers.items()]


def take(reader, records, start=0):
    events = (reader.accept("t", 0, offset, *given) for offset, given in enumerate(records, start))
    return [event for event in events if event]


class Context(unittest.TestCase):
    """Written as the relay writes it: src/record/envelope.rs."""

    def read(self, value, headers, **options):
        return Reader(**options).accept("t", 0, 0, b"k", value, [(name, text.encode()) for name, text in headers])

    def test_one_header_has_all_of_it(self):
        headers = [("id", "1"), ("x-context", '{"u":"\\"7","n":null,"id":"mine","d":1.10}')]
        event = self.read(b"{}", headers, blob="x-context")
        self.assertEqual(event.headers, [("id", b"1"), ("u", b'"7'), ("n", None), ("d", b"1.10")])
        self.assertEqual(event.onward(), [("u", b'"7'), ("n", None), ("d", b"1.10")])
        for headers in ([("x-context", "[1]")], [("x-context", "broken")], [("other", "{}")]):
            event = self.read(b"{}", headers, blob="x-context")
            self.assertEqual(event.headers, [(name, text.encode()) for name, text in headers])

    def test_attributes_of_the_context_go_on(self):
        headers = [("ce_id", "1"), ("ce_source", "/shop"), ("ce_authid", "u-7"), ("traceparent", "t"), ("ce_traceparent", "t")]
        event = self.read(b"{}", headers)
        self.assertEqual((event.id, event.onward()), ("1", [("traceparent", b"t"), ("authid", b"u-7")]))

    def test_a_structured_event_gives_its_payload_back(self):
        kind = [("id", "1"), ("content-type", "application/cloudevents+json")]
        head = '{"specversion":"1.0","type":"E","authid":"u","datacontenttype":'
        for rest, payload in [
            ('"application/json","data":{"a": 1.10, "data":"x"}}', b'{"a": 1.10, "data":"x"}'),
            ('"application/json","data":"text"}', b'"text"'),
            ('"text/plain","data":"x\\n"}', b"x\n"),
            ('"image/png","data_base64":"/wA="}', b"\xff\0"),
            ('"application/json"}', None),
        ]:
            event = self.read((head + rest).encode(), kind)
            self.assertEqual(event.payload, payload, rest)
            self.assertEqual(event.onward(), [("authid", b"u")])
            self.assertEqual(whippet_reader._get(event.headers, "ce_type"), b"E")
        for value in (b"[]", b"{}", b"broken", b'{"specversion":"1.0","data_base64":"*"}', b"\xff"):
            event = self.read(value, kind)
            self.assertEqual((event.payload, len(event.headers)), (value, 2))


class Vectors(unittest.TestCase):
    def test_the_reader_is_what_the_vectors_say(self):
        now = {}  # stands in for the codecs that are not in the standard library
        decoders = dict.fromkeys(["zstd", "lz4", "snappy"], lambda value, at_most: decoded(now["payload"]))
        for case in VECTORS["cases"]:
            reader = Reader(fetcher(case["objects"]), decoders=decoders, max_payload_bytes=VECTORS["max_payload_bytes"])
            for offset, (given, expected) in enumerate(zip(case["records"], case["expect"], strict=True)):
                now = expected or {}
                with self.subTest(case["name"], record=offset):
                    if expected and "error" in expected:
                        with self.assertRaises(ReadError) as raised:
                            reader.accept("t", 0, offset, *record(given))
                        error = raised.exception
                        self.assertEqual(error.kind, expected["error"], error)
                        self.assertEqual(error.first, expected.get("first", offset))
                        continue
                    event = reader.accept("t", 0, offset, *record(given))
                    if expected is None:
                        self.assertIsNone(event)
                        continue
                    found = (event.id, event.payload, event.travelled)
                    self.assertEqual(found, (expected["event"], decoded(expected["payload"]), expected["travelled"]))
                    self.assertEqual(event.first, expected.get("first", event.first))
                    self.assertEqual(event.still_encoded, expected.get("still_encoded"))
                    reader.done(event)
            self.assertEqual(reader.safe_offsets(), {("t", 0): case["safe"]}, case["name"])

    def test_chunk_ids(self):
        for given in VECTORS["chunk_ids"]:
            self.assertEqual(chunk_id(given["event"], given["chunk_bytes"], given["sha256"]), given["id"])


class Histories(unittest.TestCase):
    def test_shuffled_repeated_dropped_and_damaged_chunks_give_the_payload_or_nothing(self):
        for seed in range(300):
            chance = random.Random(seed)
            payloads = {str(n): chance.randbytes(chance.randrange(60)) for n in range(chance.randrange(1, 4))}
            log = [given for name, payload in payloads.items() for given in chunks(name, payload, chance.randrange(1, 20))]
            log += chance.choices(log, k=chance.randrange(5))
            chance.shuffle(log)
            del log[: chance.randrange(3)]
            if chance.random() < 0.3 and log:
                at = chance.randrange(len(log))
                key, value, headers = log[at]
                log[at] = (key, bytes(byte ^ 1 for byte in value), headers)
            there = {(headers[0][1], headers[2][1]) for _, _, headers in log}
            reader, found = Reader(), {}
            for offset, given in enumerate(log):
                try:
                    event = reader.accept("t", 0, offset, *given)
                except ReadError:
                    continue
                if event:
                    self.assertNotIn(event.id, found)
                    found[event.id] = event.payload
            for name, payload in found.items():
                self.assertEqual(payload, payloads[name], seed)
                count = len({index for event, index in there if event == name.encode()})
                self.assertGreater(count, 0)

    def test_a_reader_that_starts_again_where_it_is_safe_misses_nothing(self):
        for seed in range(200):
            chance = random.Random(seed)
            payloads = {str(n): chance.randbytes(40) for n in range(4)}
            queues = [list(chunks(name, payload, 7)) for name, payload in payloads.items()]
            log = []
            while any(queues):
                log.append(chance.choice([queue for queue in queues if queue]).pop(0))
            dies = chance.randrange(len(log))
            reader, done = Reader(), set()
            for event in take(reader, log[:dies]):
                if chance.random() < 0.5:
                    reader.done(event)
                    done.add(event.id)
            start = reader.safe_offsets().get(("t", 0), 0)
            done |= {event.id for event in take(Reader(), log[start:], start)}
            self.assertEqual(done, set(payloads), seed)


class Limits(unittest.TestCase):
    def test_a_bomb_costs_no_more_than_the_limit(self):
        bomb = gzip.compress(bytes(64 << 20))
        tracemalloc.start()
        with self.assertRaises(ReadError) as raised:
            whippet_reader.gunzip(bomb, 1000)
        self.assertLess(tracemalloc.get_traced_memory()[1], 1 << 20)
        tracemalloc.stop()
        self.assertIn("larger than 1000 bytes", str(raised.exception))
        self.assertEqual(whippet_reader.gunzip(gzip.compress(b"ab") + gzip.compress(b"c"), 3), b"abc")
        for wrong in (b"", gzip.compress(b"ab")[:-1], gzip.compress(b"ab") + b"x"):
            with self.assertRaises(ReadError):
                whippet_reader.gunzip(wrong, 1000)

    def test_a_set_that_is_not_continued_is_given_up(self):
        reader, parts = Reader(chunk_gap=10), list(chunks("1", b"abcdef", 2))
        take(reader, parts[:2], 5)
        take(reader, [(b"k", b"x", [])], 16)
        self.assertEqual(reader.lost(), [])
        take(reader, [(b"k", b"x", [])], 17)
        (lost,) = reader.lost()
        self.assertEqual((lost.kind, lost.first, lost.last), ("expired", 5, 6))
        self.assertEqual(reader.safe_offsets(), {("t", 0): 5})
        reader.done(lost)
        self.assertEqual(reader.safe_offsets(), {("t", 0): 16})
        self.assertEqual(take(reader, parts[2:], 18), [])
        self.assertEqual([event.first for event in take(reader, parts, 19)], [19])

    def test_the_stalest_sets_make_room(self):
        sets = [list(chunks(str(n), bytes([n]) * 300, 100)) for n in range(5)]
        log = [parts[index] for index in range(3) for parts in sets]
        reader = Reader(max_chunk_bytes=3 * (300 + 3 * 64))
        self.assertEqual([event.id for event in take(reader, log)], ["2", "3", "4"])
        self.assertEqual([(error.kind, error.first) for error in reader.lost()], [("no_room", 0), ("no_room", 1)])
        self.assertEqual([event.id for event in take(Reader(max_chunk_sets=2), log)], ["3", "4"])
        # The stalest is the one that has waited for the longest, not the oldest.
        first, second, third = sets[:3]
        log = [first[0], second[0], first[1], third[0], first[2]]
        self.assertEqual([event.id for event in take(Reader(max_chunk_sets=2), log)], ["0"])

    def test_the_sets_of_a_partition_that_was_taken_away_leave_their_room(self):
        reader = Reader(max_chunk_sets=1)
        take(reader, list(chunks("1", b"abc", 1))[:2])
        reader.forget("t", 0)
        self.assertEqual([event.id for event in take(reader, chunks("2", b"abc", 1), 2)], ["2"])
        self.assertEqual(reader.lost(), [])

    def test_ids_are_remembered_within_a_window_and_partitions_can_be_forgotten(self):
        def given(n):
            return b"k", b"x", [("id", str(n).encode())]

        reader = Reader(remembered_ids=2)
        self.assertEqual(len(take(reader, [given(0), given(1), given(1), given(2), given(0)])), 4)
        self.assertIsNone(reader.accept("t", 0, 5, *given(2)))
        self.assertIsNotNone(reader.accept("t", 1, 0, *given(2)))
        halves = list(chunks("3", b"ab", 1))
        take(reader, halves[:1], 6)
        reader.forget("t", 0)
        self.assertEqual(reader.safe_offsets(), {("t", 1): 0})
        self.assertEqual(take(reader, halves[1:], 7), [])
        self.assertIsNotNone(reader.accept("t", 0, 5, *given(2)))


class Context(unittest.TestCase):
    def test_the_context_goes_on_and_what_is_about_the_event_does_not(self):
        context = [("traceparent", b"t"), ("tenant", b"a")]
        headers = [("id", b"1"), ("eventType", b"E"), *context, ("whippet-replay", b"r"), ("_lm", b"x"), ("ce_id", b"1")]
        event = Reader().accept("t", 0, 0, b"k", b"x", headers)
        self.assertEqual(event.onward(), context)
        self.assertEqual(event.headers, headers)


class Stores(unittest.TestCase):
    def refuses(self, fetch, uri, text, at_most=10):
        with self.assertRaises(ReadError) as raised:
            fetch(uri, at_most)
        self.assertIn(text, str(raised.exception))

    def test_a_folder(self):
        with tempfile.TemporaryDirectory() as folder:
            inside = pathlib.Path(folder, "payloads")
            (inside / "topic").mkdir(parents=True)
            (inside / "topic" / "a b").write_bytes(b"payload")
            pathlib.Path(folder, "secret").write_bytes(b"secret")
            fetch = whippet_reader.from_folder(inside)
            self.assertEqual(fetch(f"file://{inside}/topic/a%20b", 7), b"payload")
            self.refuses(fetch, f"file://{inside}/topic/a%20b", "more than 6 bytes", 6)
            self.refuses(fetch, f"file://{inside}/topic/none", "there is no object")
            for uri in (f"file://{folder}/secret", f"file://{inside}/../secret", f"file://{inside}/%2E%2E/secret",
                        f"file://{inside}2/x", f"s3://{inside}/x", f"file://{inside}/", f"file://{inside}//etc/passwd"):
                self.refuses(fetch, uri, "only objects there are read")

    def test_a_client_of_boto3(self):
        class Client:
            class exceptions:  # noqa: N801
                class NoSuchKey(Exception):
                    pass

            def get_object(self, Bucket, Key):  # noqa: N803
                if (Bucket, Key) != ("payloads", "prod/topic/a=b"):
                    raise self.exceptions.NoSuchKey
                return {"Body": io.BytesIO(b"payload")}

        fetch = whippet_reader.from_boto3(Client(), "payloads", "prod")
        self.assertEqual(fetch("s3://payloads/prod/topic/a%3Db", 7), b"payload")
        self.refuses(fetch, "s3://payloads/prod/topic/a%3Db", "more than 6 bytes", 6)
        self.refuses(fetch, "s3://payloads/prod/none", "there is no object")
        self.refuses(fetch, "s3://payloads/other/topic", "only objects there are read")
        self.refuses(fetch, "s3://others/prod/topic", "only objects there are read")

    def test_what_a_client_raises_goes_through_and_the_record_can_be_given_again(self):
        answers = [ConnectionError("away"), b"payload"]

        def fetch(uri, at_most):
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

        reader = Reader(fetch)
        given = b"k", b"s3://b/k", [("id", b"1"), ("__large.message.backed.value", b"\1")]
        with self.assertRaises(ConnectionError):
            reader.accept("t", 0, 3, *given)
        self.assertEqual(reader.safe_offsets(), {("t", 0): 3})
        self.assertEqual(reader.accept("t", 0, 3, *given).payload, b"payload")

    def test_without_a_store_or_a_decoder_it_is_said(self):
        self.refuses(lambda *_: Reader().accept("t", 0, 0, b"k", b"s3://b/k", [("__large.message.backed.value", b"\1")]),
                     "", "none is given to this reader")
        self.refuses(lambda *_: Reader().accept("t", 0, 0, b"k", b"x", [("content-encoding", b"zstd")]),
                     "", "give the reader a decoder")


if __name__ == "__main__":
    unittest.main()
