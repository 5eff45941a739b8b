"""Reads what Whippet writes to Kafka, whatever size it has: docs/large-payloads.md is the format.

One file, and nothing but the standard library of Python 3.10 or later. It knows no Kafka client:
give it records, and it gives back events. With confluent-kafka, and commits by hand:

    reader = Reader(fetch=from_boto3(boto3.client("s3"), "payloads", "prod"))
    while True:
        message = consumer.poll(1.0)
        if message is None or message.error():
            continue
        event = reader.accept(message.topic(), message.partition(), message.offset(),
                              message.key(), message.value(), message.headers())
        if event:
            handle(event.payload, event.onward())
            reader.done(event)
        consumer.commit(offsets=[TopicPartition(*place, offset)
                                 for place, offset in reader.safe_offsets().items()])

What cannot be read is a ReadError; it holds `safe_offsets` back, as an event does, until `done` is
called with it. What `fetch` raises besides goes through: call `accept` again with the same record. When
partitions are taken away, call `forget`.
"""

import base64
import hashlib
import json
import re
import urllib.parse
import uuid
import zlib
from collections import OrderedDict
from dataclasses import dataclass, field

CHUNK_NAMESPACE = uuid.uuid5(uuid.UUID(int=0), "whippet-chunk-id")

_OF_THE_EVENT = {
    "id", "eventType", "version", "content-type", "content-encoding", "_lm",
    "x-chunk-index", "x-chunk-count", "x-chunk-last", "x-chunk-first-offset",
}
_PREFIXES_OF_THE_EVENT = ("whippet-", "__large.message.backed.", "ce_")
_BACKED = "__large.message.backed.value"
_BACKED_COMPRESSION = ("__large.message.backed.compression", "__large.message.backed..compression")
_BACKED_CODECS = (None, "gzip", None, None, "zstd")
_STRUCTURED = b"application/cloudevents+json"
_OF_A_CLOUDEVENT = {
    "id", "type", "time", "specversion", "datacontenttype", "data", "baggage", "source", "subject", "dataschema", "dataref",
}
_CODECS = ("gzip", "zstd", "lz4", "snappy")
_SLICE_COST = 64
_GIVEN_UP = 1000


class ReadError(Exception):
    """Why there is no event. `kind` is one of header, too_large, no_store, store, wrong_size,
    wrong_checksum, conflict, expired, no_room, encoding and decode."""

    topic = partition = first = last = None

    def __init__(self, kind, message):
        super().__init__(message)
        self.kind = kind


@dataclass
class Event:
    topic: str
    partition: int
    first: int  # the offset of its first record
    last: int
    key: bytes | None
    payload: bytes | None  # None is a tombstone
    headers: list
    travelled: str = "inline"  # or reference, or chunks
    still_encoded: str | None = None  # by the application itself, in a way that is not Whippet's

    @property
    def id(self):
        found = _get(self.headers, "id") or _get(self.headers, "ce_id")
        return (found or b"").decode(errors="replace") or None

    def onward(self):
        """The request's context: headers to put on everything that is produced because of this event."""
        return [
            (name, value) for name, value in self.headers
            if name not in _OF_THE_EVENT and not name.startswith(_PREFIXES_OF_THE_EVENT)
        ]


@dataclass
class _Set:
    facts: tuple  # count, size, sha256, codec, event id, key
    first: int
    last: int
    slices: dict = field(default_factory=dict)
    bytes: int = 0

    @property
    def cost(self):
        return self.facts[1] + self.facts[0] * _SLICE_COST


class _Partition:
    def __init__(self):
        self.next = 0
        self.open = set()
        self.seen = OrderedDict()
        self.sets = {}
        self.given_up = OrderedDict()


def chunk_id(event_id, chunk_bytes, sha256):
    """The id that a relay gives to the chunks of an event; `sha256` is of the whole, in hexadecimal."""
    return str(uuid.uuid5(CHUNK_NAMESPACE, f"{event_id}/{chunk_bytes}/{sha256}"))


class Reader:
    """`fetch(uri, at_most)` returns an object's bytes; see from_folder, from_boto3 and from_obstore.
    `decoders` has a function (bytes, at_most) -> bytes for each codec besides gzip. `blob` is the header
    that has all of the context, where the relay has headers.blob."""

    def __init__(self, fetch=None, *, decoders=None, blob=None, max_payload_bytes=256 << 20, max_chunk_bytes=512 << 20,
                 max_chunk_sets=10_000, chunk_gap=100_000, remembered_ids=100_000):
        self._fetch = fetch
        self._blob = blob
        self._decoders = {"gzip": gunzip, **(decoders or {})}
        self._max_payload = max_payload_bytes
        self._max_chunks = max_chunk_bytes
        self._max_sets = max_chunk_sets
        self._gap = chunk_gap
        self._remembered = remembered_ids
        self._partitions = {}
        self._sets = OrderedDict()  # (topic, partition, id) -> _Set, the stalest first
        self._lost = []

    def accept(self, topic, partition, offset, key, value, headers):
        """The event that this record completes, or None: a repeat, or a chunk that waits for others."""
        at, headers = (topic, partition), _unfold(list(headers or ()), self._blob)
        state = self._partitions.setdefault(at, _Partition())
        state.next = max(state.next, offset + 1)
        self._expire(at, state, offset)
        event = Event(topic, partition, offset, offset, key, None, headers)
        mark = (key, _get(headers, "id"))
        if mark[1] is not None and mark in state.seen:
            return None
        state.open.add(offset)
        try:
            if not self._fill(event, state, value):
                return None
        except ReadError as error:
            _place(error, topic, partition, event.first, offset)
            raise
        if mark[1] is not None and self._remembered:
            state.seen[mark] = None
            while len(state.seen) > self._remembered:
                state.seen.popitem(last=False)
        # What else there is of this event was left by a crash.
        for name, waiting in list(state.sets.items()):
            if event.id is not None and waiting.facts[4] == event.id:
                state.open.discard(self._end(at, name).first)
        return event

    def lost(self):
        """Sets of chunks that were given up since the last call, as ReadErrors. Ask now and then."""
        lost, self._lost = self._lost, []
        return lost

    def done(self, event):
        """The event is processed, or the error is looked at."""
        state = self._partitions.get((event.topic, event.partition))
        if state:
            state.open.discard(event.first)

    def safe_offsets(self):
        """For each (topic, partition) the offset to commit, and to start from again."""
        return {at: min(state.open, default=state.next) for at, state in self._partitions.items()}

    def forget(self, topic, partition):
        """Somebody else reads this partition now, or it is read again from an earlier offset."""
        at = (topic, partition)
        state = self._partitions.get(at)
        for name in list(state.sets) if state else ():
            self._end(at, name)
        self._partitions.pop(at, None)
        self._lost = [error for error in self._lost if (error.topic, error.partition) != at]

    def _fill(self, event, state, value):
        """Whether the event is complete now."""
        headers = event.headers
        chunk, uri = _text(headers, "whippet-chunk-id"), _text(headers, "whippet-ref-uri")
        if value is None:
            if chunk is not None or uri is not None:
                raise _bad("whippet-chunk-id" if chunk is not None else "whippet-ref-uri", "there is no value beside it")
            return True
        if chunk is not None:
            return self._join(event, state, chunk, value)
        if uri is not None:
            if value != uri.encode():
                raise _bad("whippet-ref-uri", "it is not what the value says")
            promised = (_number(headers, "whippet-ref-size"), _sha256(headers, "whippet-ref-sha256"))
            codec = _text(headers, "whippet-ref-encoding")
            if codec not in (None, *_CODECS):
                raise ReadError("encoding", f"the payload was encoded as {codec!r} on its way: is this reader too old?")
            return self._refer(event, uri, promised, codec or _content_encoding(headers))
        backed = _find(headers, _BACKED)
        if backed is not None and backed[0] not in (b"\0", b"\1"):
            raise _bad(_BACKED, "expected one byte, 0 or 1")
        codec = _backed_codec(headers) if backed else None
        if backed and backed[0] == b"\1":
            try:
                return self._refer(event, value.decode(), None, codec or _content_encoding(headers))
            except UnicodeDecodeError:
                raise _bad(_BACKED, "the value is no URI") from None
        self._decode(event, codec or _content_encoding(headers), value)
        return True

    def _refer(self, event, uri, promised, codec):
        at_most = self._max_payload
        if promised:
            at_most = promised[0]
            if at_most > self._max_payload:
                raise _too_large(at_most, self._max_payload)
        self._decoder(codec)
        if self._fetch is None:
            raise ReadError("no_store", f"the payload is in an object store, and none is given to this reader: {uri}")
        found = self._fetch(uri, at_most)
        if promised:
            _check(f"the object {uri}", found, *promised)
        elif len(found) > at_most:
            raise _too_large(len(found), at_most)
        event.travelled = "reference"
        self._decode(event, codec, found)
        return True

    def _join(self, event, state, name, value):
        at, headers, offset = (event.topic, event.partition), event.headers, event.last
        index, count = _number(headers, "whippet-chunk-index"), _number(headers, "whippet-chunk-count")
        size, sha256 = _number(headers, "whippet-chunk-size"), _sha256(headers, "whippet-chunk-sha256")
        codec, event_id = _content_encoding(headers), _text(headers, "id")
        if index >= count:
            raise _bad("whippet-chunk-index", "it is not below the count")
        if count > max(size, 1):
            raise _bad("whippet-chunk-count", "there are more chunks than bytes")
        self._decoder(codec)
        facts = (count, size, sha256, codec, event_id, event.key)
        found = state.sets.get(name)
        if found is None:
            if index > 0 and name in state.given_up:
                state.open.discard(offset)
                return False
            state.given_up.pop(name, None)
            found = self._begin(at, state, name, _Set(facts, offset, offset))
        found.last = max(found.last, offset)
        self._sets.move_to_end((*at, name))
        # A chunk is held back by its set alone.
        event.first = found.first
        if offset != found.first:
            state.open.discard(offset)
        why = self._conflict(found, facts, index, value)
        if why:
            self._give_up(at, state, name)
            raise ReadError("conflict", f"chunks of {name} do not fit together: {why}")
        if index not in found.slices:
            found.slices[index] = value
            found.bytes += len(value)
        if len(found.slices) < count:
            return False
        self._end(at, name)
        whole = b"".join(found.slices[index] for index in range(count))
        _check(f"the whole of chunks {name}", whole, size, sha256)
        event.travelled = "chunks"
        self._decode(event, codec, whole)
        return True

    @staticmethod
    def _conflict(found, facts, index, value):
        if found.facts != facts:
            return "they differ in count, size, sha256, encoding, event or key"
        if index in found.slices:
            return None if found.slices[index] == value else "a chunk that came again has other bytes"
        if not value and facts[1]:
            return "a chunk is empty"
        if found.bytes + len(value) > facts[1]:
            return "they are larger than their whole"
        return None

    def _begin(self, at, state, name, new):
        at_most = min(self._max_payload, self._max_chunks)
        if new.facts[1] > at_most or new.cost > self._max_chunks:
            self._remember(state, name)
            raise _too_large(new.facts[1], at_most)
        while self._sets and (
            len(self._sets) >= self._max_sets or sum(s.cost for s in self._sets.values()) + new.cost > self._max_chunks
        ):
            topic, partition, stalest = next(iter(self._sets))
            self._drop((topic, partition), stalest, "no_room", "had to make room: raise the reader's limits")
        state.sets[name] = self._sets[(*at, name)] = new
        return new

    def _expire(self, at, state, offset):
        for name in [name for name, waiting in state.sets.items() if waiting.last + self._gap < offset]:
            self._drop(at, name, "expired", f"no more came in {self._gap} offsets")

    def _drop(self, at, name, kind, why):
        gone = self._give_up(at, self._partitions[at], name)
        error = ReadError(
            kind, f"chunks of {name} (event {gone.facts[4]}), {len(gone.slices)} of {gone.facts[0]}: {why}"
        )
        self._lost.append(_place(error, *at, gone.first, gone.last))

    def _give_up(self, at, state, name):
        self._remember(state, name)
        return self._end(at, name)

    @staticmethod
    def _remember(state, name):
        state.given_up[name] = None
        while len(state.given_up) > _GIVEN_UP:
            state.given_up.popitem(last=False)

    def _end(self, at, name):
        del self._sets[(*at, name)]
        return self._partitions[at].sets.pop(name)

    def _decoder(self, codec):
        if codec in _CODECS and codec not in self._decoders:
            raise ReadError("encoding", f"the payload is encoded as {codec!r}: give the reader a decoder for it")
        return self._decoders.get(codec)

    def _decode(self, event, codec, value):
        decode = self._decoder(codec)
        if decode is None:
            event.payload, event.still_encoded = value, codec
        else:
            event.payload = decode(value, self._max_payload)
            if len(event.payload) > self._max_payload:
                raise _too_large(len(event.payload), self._max_payload)
        if (_get(event.headers, "content-type") or b"").startswith(_STRUCTURED):
            _open(event)


def _unfold(headers, blob):
    """Lays context open that came in one header, or as attributes of a CloudEvent."""
    try:
        context = json.loads(_get(headers, blob) or b"", parse_float=_Number, parse_int=_Number) if blob else None
    except (ValueError, RecursionError):
        context = None
    if isinstance(context, dict):
        headers = [(name, value) for name, value in headers if name != blob]
        for name, value in context.items():
            _add(headers, name, _as_text(value))
    for name, value in list(headers):
        if name.startswith("ce_") and re.fullmatch("[a-z0-9]+", name[3:]) and name[3:] not in _OF_A_CLOUDEVENT:
            _add(headers, name[3:], value)
    return headers


def _open(event):
    """Takes the payload out of a structured CloudEvent; what is none stays as it is."""
    try:
        whole = event.payload.decode()
        members = json.loads(whole, parse_float=_Number, parse_int=_Number)
        if not isinstance(members, dict) or members.get("specversion") is None:
            return
        data = base64.b64decode(members["data_base64"], validate=True) if "data_base64" in members else None
    except (ValueError, TypeError, RecursionError):
        return
    kind = members.get("datacontenttype")
    if members.get("data") is not None:
        is_text = isinstance(members["data"], str) and kind is not None and not _is_json(kind)
        data = members["data"].encode() if is_text else _member(whole, "data").encode()
    headers = [(name, value) for name, value in event.headers if name != "content-type"]
    for name, value in members.items():
        if name not in ("data", "data_base64") and value is not None:
            _add(headers, "content-type" if name == "datacontenttype" else f"ce_{name}", _as_text(value))
    event.payload, event.headers = data, _unfold(headers, None)


def _member(whole, wanted):
    """The text of a member of a JSON object, as it is written."""
    at, found = re.compile(r"\s*{\s*").match(whole).end(), None
    decoder, between = json.JSONDecoder(), re.compile(r"\s*[:,]?\s*")
    while whole[at] != "}":
        name, at = decoder.raw_decode(whole, at)
        start = between.match(whole, at).end()
        _, end = decoder.raw_decode(whole, start)
        if name == wanted:
            found = whole[start:end]
        at = between.match(whole, end).end()
    return found


class _Number(str):
    """A number of JSON, as it is written."""


def _as_text(value):
    if value is None or isinstance(value, str):
        return None if value is None else value.encode()
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _is_json(kind):
    kind = kind.split(";")[0].strip().lower()
    return kind in ("application/json", "text/json") or kind.endswith("+json")


def _add(headers, name, value):
    """What is there already wins."""
    if _find(headers, name) is None:
        headers.append((name, value))


def gunzip(value, at_most):
    """RFC 1952, all members of it, and not a byte more than `at_most`."""
    decoded = bytearray()
    while True:
        member = zlib.decompressobj(wbits=31)
        try:
            decoded += member.decompress(value, at_most + 1 - len(decoded))
        except zlib.error as error:
            raise ReadError("decode", f"the payload is not a whole gzip stream: {error}") from None
        if len(decoded) > at_most:
            raise ReadError("decode", f"the payload is larger than {at_most} bytes once decoded")
        if not member.eof:
            raise ReadError("decode", "the payload is not a whole gzip stream: it was cut")
        value = member.unused_data
        if not value:
            return bytes(decoded)


def from_folder(folder):
    """Fetches file:// objects below a folder."""
    base = "file://" + urllib.parse.quote(str(folder).rstrip("/"))

    def fetch(uri, at_most):
        path = f"{str(folder).rstrip('/')}/{_key(uri, base)}"
        try:
            with open(path, "rb") as file:
                return _bounded(uri, file.read(at_most + 1), at_most)
        except FileNotFoundError:
            raise ReadError("store", f"there is no object {uri}") from None

    return fetch


def from_boto3(client, bucket, prefix=""):
    """Fetches s3:// objects below a prefix with a client of boto3."""
    base = f"s3://{bucket}/{urllib.parse.quote(prefix)}".rstrip("/")

    def fetch(uri, at_most):
        key = "/".join(part for part in (prefix.strip("/"), _key(uri, base)) if part)
        try:
            found = client.get_object(Bucket=bucket, Key=key)
        except client.exceptions.NoSuchKey:
            raise ReadError("store", f"there is no object {uri}") from None
        return _bounded(uri, found["Body"].read(at_most + 1), at_most)

    return fetch


def from_obstore(store, url):
    """Fetches objects with a store of obstore that was made for `url`, which is s3://bucket/prefix or
    the like."""
    base = url.rstrip("/")

    def fetch(uri, at_most):
        try:
            found = store.get(_key(uri, base))
        except FileNotFoundError:
            raise ReadError("store", f"there is no object {uri}") from None
        if found.meta["size"] > at_most:
            raise _too_large(found.meta["size"], at_most)
        return bytes(found.bytes())

    return fetch


def _key(uri, base):
    """The object's key below `base`: a reader goes nowhere else."""
    key = urllib.parse.unquote(uri[len(base) + 1:])
    if not uri.startswith(base + "/") or not key or {"", ".", ".."} & set(key.split("/")):
        raise ReadError("store", f"{uri} is not in {base}; only objects there are read")
    return key


def _bounded(uri, found, at_most):
    if len(found) > at_most:
        raise ReadError("wrong_size", f"the object {uri} has more than {at_most} bytes")
    return found


def _check(what, found, size, sha256):
    if len(found) != size:
        raise ReadError("wrong_size", f"{what} has {len(found)} bytes where {size} were promised")
    if hashlib.sha256(found).hexdigest() != sha256:
        raise ReadError("wrong_checksum", f"{what} has another sha256 than was promised")


def _place(error, topic, partition, first, last):
    error.topic, error.partition, error.first, error.last = topic, partition, first, last
    return error


def _bad(name, why):
    return ReadError("header", f"header {name}: {why}")


def _too_large(size, at_most):
    return ReadError("too_large", f"the payload has {size} bytes, and {at_most} are taken at most")


def _find(headers, name):
    """(value,) of the last header of this name, or None."""
    found = [value for known, value in headers if known == name]
    return (found[-1],) if found else None


def _get(headers, name):
    found = _find(headers, name)
    return found[0] if found else None


def _text(headers, name):
    found = _find(headers, name)
    if found is None:
        return None
    try:
        text = (found[0] or b"").decode()
    except UnicodeDecodeError:
        text = ""
    if not text:
        raise _bad(name, "expected text")
    return text


def _needed(headers, name):
    text = _text(headers, name)
    if text is None:
        raise _bad(name, "it is missing")
    return text


def _number(headers, name):
    text = _needed(headers, name)
    if not re.fullmatch("[0-9]{1,18}", text):
        raise _bad(name, "expected a decimal number")
    return int(text)


def _sha256(headers, name):
    text = _needed(headers, name)
    if not re.fullmatch("[0-9a-f]{64}", text):
        raise _bad(name, "expected 64 lowercase hexadecimal digits")
    return text


def _content_encoding(headers):
    codec = _text(headers, "content-encoding")
    return None if codec == "identity" else codec


def _backed_codec(headers):
    name = next((name for name in _BACKED_COMPRESSION if _find(headers, name)), None)
    if name is None:
        return None
    value = _get(headers, name)
    if value is None or len(value) != 1 or value[0] > 4:
        raise _bad(name, "expected a byte from 0 to 4")
    if value[0] in (2, 3):
        raise ReadError("encoding", "snappy and lz4 are in a framing of Kafka's own here")
    return _BACKED_CODECS[value[0]]
