"""The four JetStream assets, declared once: created where missing, compared where present.

Nothing but this module creates a stream.  A stream that the lake already holds a cursor for is never created anew: its
absence is a loss to be reported, not a gap to be papered over (the caller says which streams those are).
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from typing import Any, Final

import msgspec

from holdfast.schemas.errors import ConfigurationError, DriftError, GapError, HoldfastError, UnavailableError
from holdfast.schemas.ids import iso_from_ms
from holdfast.streams.connection import ApiError, Connection
from holdfast.streams.retry import READ_DEADLINE_S, call_with_retry
from holdfast.streams.wire import DEAD_STREAM, EVENTS_STREAM, HOT_STREAM, KEYS_STREAM

logger = logging.getLogger(__name__)

EPOCH_KEY: Final = "holdfast.epoch"
EPOCH_START_KEY: Final = "holdfast.epoch-start"
EARLIER_EPOCHS_KEY: Final = "holdfast.earlier-epochs"
"""The lives before, as ``<epoch>@<end>``, oldest first: what a message before that end belongs to."""
VERSION_KEY: Final = "holdfast.version"
HEADS_ARCHIVED_KEY: Final = "holdfast.heads-archived"
"""Set to "1" before the newest version of a key first leaves the bucket: from then on a key without a head may have
versions in the lake."""
LAYOUT_VERSION: Final = "1"

PURGE_S: Final = 60.0
"""How long a purge may take: 190,000 messages take 85 ms on an idle disk."""

_LIVES_KEPT: Final = 32
"""Lives of a stream that are remembered; each is one lost tail, or one restore."""
_STREAM_NOT_FOUND: Final = 10059
_NAME_IN_USE: Final = 10058
_NO_MESSAGE: Final = 10037
_STORE_FAILED: Final = 10049
_NO_PEERS: Final = 10005
_NOT_CLUSTERED: Final = 10074
_CREATE_S: Final = 5.0
"""How long a stream's store is waited for, and the servers of a cluster that have not found each other yet."""
_NS: Final = 1_000_000_000

HEARD_S: Final = 3.0
"""How long ago a leader must have heard of another server at most, to count it: servers tell of themselves each second,
and wait four for a leader before they choose another one."""


class StreamInfo(msgspec.Struct, frozen=True):
    """What a stream said of itself.

    ``epoch`` names this life of the stream, which began at ``epoch_start``: what stands before belongs to an earlier
    one, and is archived.  ``earlier`` has those, each with the sequence that it ended before, oldest first.
    ``heads_archived``, of the bucket of keys: whether heads may have left it.
    """

    name: str
    epoch: str
    first_seq: int
    last_seq: int
    messages: int
    bytes: int
    replicas: int
    epoch_start: int = 1
    heads_archived: bool = False
    earlier: tuple[tuple[str, int], ...] = ()

    @property
    def life(self) -> str | Callable[[int], str]:
        """The life of every message, or what tells it of a sequence where the stream has had several."""
        return self.epoch_at if self.earlier else self.epoch

    def epoch_at(self, seq: int) -> str:
        """Returns the life that a message belongs to: raw events without an id are named by it."""
        for epoch, end in self.earlier:
            if seq < end:
                return epoch
        return self.epoch


def declarations(*, replicas: int = 1, duplicate_window_s: float = 600.0) -> dict[str, dict[str, Any]]:
    """Returns the declared configuration of every stream, by name.

    ``duplicate_window_s``: for how long the server itself refuses a repeated event id; as long as a writer retries
    (10 min), at ~180 B of server memory an id.
    """
    common: dict[str, Any] = {
        "retention": "limits",
        "storage": "file",
        "num_replicas": replicas,
        # Nothing but a purge below the watermark takes a message away: no age, no count, no size, no single delete.
        "max_age": 0,
        "max_msgs": -1,
        "max_bytes": -1,
        "deny_delete": True,
        "deny_purge": False,
        "allow_direct": True,
        # A roll-up header from any client would delete history.
        "allow_rollup_hdrs": False,
        "allow_atomic": True,
        # Server-side compression and encryption have had corruption bugs: bodies are compressed before they are sent.
        "compression": "none",
    }
    window_ns = int(duplicate_window_s * _NS)
    return {
        HOT_STREAM: common
        | {
            "subjects": ["$KV.ctx-hot.>"],
            "max_msgs_per_subject": 1,
            # Together: a plain put on an existing context is refused instead of replacing it.
            "discard": "new",
            "discard_new_per_subject": True,
            "duplicate_window": window_ns,
        },
        KEYS_STREAM: common
        | {
            "subjects": ["$KV.ctx-keys.>"],
            # "Unlimited" as a number: nats-py refuses a bucket that says -1.
            "max_msgs_per_subject": 1_000_000_000,
            "discard": "new",
            "duplicate_window": window_ns,
        },
        EVENTS_STREAM: common
        | {
            "subjects": ["ctx.*.event.>"],
            "max_msgs_per_subject": -1,
            "discard": "new",
            "duplicate_window": window_ns,
        },
        DEAD_STREAM: common
        | {
            "subjects": ["ctx.*.dead.>"],
            "max_msgs_per_subject": 1,
            "discard": "new",
            "discard_new_per_subject": True,
            "duplicate_window": window_ns,
        },
    }


async def ensure_topology(
    connection: Connection,
    *,
    replicas: int = 1,
    duplicate_window_s: float = 600.0,
    archived: Collection[str] = (),
) -> dict[str, StreamInfo]:
    """Creates the streams that are missing, compares those that are there, and returns them all by name.

    A stream with fewer copies than ``replicas`` gets the rest, one with more keeps them: a worker that was started
    without the setting must not take copies away.  ``archived`` names the streams that the lake holds a cursor for.
    Raises DriftError when a stream differs from its declaration, GapError when one of ``archived`` is gone from the
    server, ConfigurationError when the server's cluster has fewer nodes than ``replicas``.  Safe to run from several
    processes at once.
    """
    found: dict[str, StreamInfo] = {}
    for name, declared in declarations(replicas=replicas, duplicate_window_s=duplicate_window_s).items():
        try:
            # A cluster that chooses its leaders, as after a start, is waited for.
            answer = await call_with_retry(
                partial(connection.api, f"STREAM.INFO.{name}"), deadline_s=READ_DEADLINE_S, nobody_s=0
            )
        except ApiError as error:
            if error.err_code != _STREAM_NOT_FOUND:
                raise
            if name in archived:
                raise GapError(
                    f"stream {name} is gone from the server, though the lake holds archived messages of it",
                    hint="check --nats-url; if the stream is truly lost, run 'holdfast up --accept-lost-streams'",
                ) from error
            answer = await _create(connection, name, declared)
        found_replicas = int(answer["config"].get("num_replicas", 1))
        if found_replicas < replicas:
            answer = await _replicate(connection, name, answer["config"], replicas)
        differences = compare(declared | {"num_replicas": max(replicas, found_replicas)}, answer["config"])
        if differences:
            raise DriftError(
                f"stream {name} differs from its declaration: {_describe(differences)}",
                differences=differences,
                hint=f"set these back with 'nats stream edit {name}'; nothing was changed",
            )
        found[name] = _info(answer)
    return found


async def stream_info(connection: Connection, name: str) -> StreamInfo:
    """Returns what stream ``name`` says of itself; raises GapError when there is no such stream.

    Of a replicated stream, what its leader says while it hears a majority: everything that was acknowledged before the
    call is in it.  Raises UnavailableError when it hears none: others may have chosen another leader.
    """
    try:
        answer = await connection.api(f"STREAM.INFO.{name}")
        require_majority(answer)
        return _info(answer)
    except ApiError as error:
        if error.err_code == _STREAM_NOT_FOUND:
            raise GapError(
                f"stream {name} does not exist on this server", hint="run 'holdfast up' or a worker once to create it"
            ) from error
        raise


def require_majority(answer: dict[str, Any]) -> None:
    """Raises UnavailableError when what answered ``STREAM.INFO`` leads a replicated stream and hears no majority."""
    replicas = int(answer["config"].get("num_replicas", 1))
    if replicas == 1:
        return
    cluster: dict[str, Any] = answer.get("cluster") or {}
    others: list[dict[str, Any]] = cluster.get("replicas") or []
    # Nothing was ever heard of one that says 0.
    heard = sum(0 < other.get("active", 0) < HEARD_S * _NS and not other.get("offline") for other in others)
    if 2 * (heard + 1) <= replicas:
        name = answer["config"]["name"]
        raise UnavailableError(
            f"the leader of stream {name} hears {heard} of {len(others)} other servers: what it knows may be old",
            hint="it is tried again; if it lasts, see which servers of the cluster are up and reach each other",
        )


def compare(declared: dict[str, Any], found: dict[str, Any]) -> dict[str, tuple[object, object]]:
    """Returns the settings in which ``found`` differs from ``declared``, as {setting: (declared, found)}.

    The server leaves a false or empty setting out of its answer.
    """
    differences: dict[str, tuple[object, object]] = {}
    for setting, value in declared.items():
        actual = found.get(setting, type(value)())
        if actual != value:
            differences[setting] = (value, actual)
    epoch = found.get("metadata", {}).get(EPOCH_KEY)
    if not epoch:
        differences[f"metadata.{EPOCH_KEY}"] = ("an epoch", epoch)
    version = found.get("metadata", {}).get(VERSION_KEY)
    if version != LAYOUT_VERSION:
        differences[f"metadata.{VERSION_KEY}"] = (LAYOUT_VERSION, version)
    return differences


async def purge_below(connection: Connection, name: str, seq: int) -> int:
    """Removes every message below a sequence; returns how many went.  The next sequence is ``seq`` at least."""
    return int((await connection.api(f"STREAM.PURGE.{name}", {"seq": seq}, timeout_s=PURGE_S))["purged"])


async def begin_epoch(connection: Connection, name: str, start: int) -> StreamInfo:
    """Begins another life of a stream at a sequence, and returns the stream's state.

    For a stream that lost its tail: positions of the old life name what was lost, those of the new one what has taken
    the same sequences since.  No message is touched.
    """
    config: dict[str, Any] = (await connection.api(f"STREAM.INFO.{name}"))["config"]
    epoch = secrets.token_hex(8)
    metadata = next_life(config.get("metadata", {}), epoch, start)
    answer = await connection.api(f"STREAM.UPDATE.{name}", config | {"metadata": metadata})
    logger.warning(
        "stream begins a new epoch",
        extra={"action": "epoch_begun", "stream": name, "epoch": epoch, "start": start},
    )
    return _info(answer)


def next_life(metadata: dict[str, str], epoch: str, start: int) -> dict[str, str]:
    """Returns a stream's metadata as of a new life that begins at a sequence: the one so far is remembered."""
    # What stands at or behind the new beginning belongs to the new life, whatever it belonged to before.
    earlier = [(name, min(end, start)) for name, end in _earlier(metadata)]
    earlier = [*earlier, (metadata.get(EPOCH_KEY, ""), start)][-_LIVES_KEPT:]
    return metadata | {
        EPOCH_KEY: epoch,
        EPOCH_START_KEY: str(start),
        EARLIER_EPOCHS_KEY: " ".join(f"{name}@{end}" for name, end in earlier),
    }


def _earlier(metadata: dict[str, str]) -> tuple[tuple[str, int], ...]:
    lives = (entry.rpartition("@") for entry in metadata.get(EARLIER_EPOCHS_KEY, "").split())
    return tuple((name, int(end)) for name, _, end in lives)


async def mark_heads_archived(connection: Connection) -> StreamInfo:
    """Writes into the keys stream's metadata that heads may have left it, and returns its state.

    From then on, whoever finds a key without a head asks the lake.  Doing it again changes nothing.
    """
    config: dict[str, Any] = (await connection.api(f"STREAM.INFO.{KEYS_STREAM}"))["config"]
    metadata = config.get("metadata", {}) | {HEADS_ARCHIVED_KEY: "1"}
    answer = await connection.api(f"STREAM.UPDATE.{KEYS_STREAM}", config | {"metadata": metadata})
    logger.info("heads of keys may be in the lake alone", extra={"action": "heads_archived", "stream": KEYS_STREAM})
    return _info(answer)


async def purge_subject(connection: Connection, name: str, subject: str, seq: int) -> int:
    """Removes every message of one subject below a sequence; returns how many went.

    ``subject`` is exact.  Never ``keep``: it would take away what was written since the caller looked.
    """
    request = {"filter": subject, "seq": seq}
    return int((await connection.api(f"STREAM.PURGE.{name}", request, timeout_s=PURGE_S))["purged"])


async def subject_counts(connection: Connection, name: str) -> AsyncIterator[dict[str, int]]:
    """Yields the subjects of a stream with the number of messages each holds, a page at a time.

    A subject that appears meanwhile may be left out, or come twice.
    """
    offset = 0
    while True:
        answer = await connection.api(f"STREAM.INFO.{name}", {"subjects_filter": ">", "offset": offset})
        subjects: dict[str, int] = answer["state"].get("subjects") or {}
        if subjects:
            yield subjects
        offset += len(subjects)
        if not subjects or offset >= answer.get("total", 0):
            return


async def first_seq_since(connection: Connection, name: str, at_ms: int) -> int | None:
    """Returns the sequence of the first message stored at or after a time, or None when every message is older.

    Asked of the leader: a server that has not caught up would call messages old that are not.
    """
    request = {"start_time": iso_from_ms(at_ms), "next_by_subj": ">", "no_hdr": True}
    try:
        return int((await connection.api(f"STREAM.MSG.GET.{name}", request))["message"]["seq"])
    except ApiError as error:
        if error.err_code == _NO_MESSAGE:
            return None
        raise


async def _create(connection: Connection, name: str, declared: dict[str, Any]) -> dict[str, Any]:
    metadata = {EPOCH_KEY: secrets.token_hex(8), VERSION_KEY: LAYOUT_VERSION}

    async def create() -> dict[str, Any]:
        try:
            return await connection.api(f"STREAM.CREATE.{name}", {"name": name, "metadata": metadata, **declared})
        except ApiError as error:
            # A stream of this name that was just deleted: its directory is still being removed.
            if error.err_code == _STORE_FAILED:
                raise UnavailableError(
                    f"the server cannot make the store of stream {name}", hint="see its log and its disk"
                ) from error
            raise _too_few_nodes(error, name, declared["num_replicas"]) or error from error

    try:
        answer = await _tried(create)
    except ApiError as error:
        # Another process created it between our look and our call, with another epoch: theirs is the one.
        if error.err_code != _NAME_IN_USE:
            raise
        return await connection.api(f"STREAM.INFO.{name}")
    logger.info("stream created", extra={"action": "stream_created", "stream": name, "epoch": metadata[EPOCH_KEY]})
    return answer


async def _replicate(connection: Connection, name: str, config: dict[str, Any], replicas: int) -> dict[str, Any]:
    """Gives a stream more copies; returns when the server has chosen where, before they are complete."""

    async def update() -> dict[str, Any]:
        try:
            return await connection.api(f"STREAM.UPDATE.{name}", config | {"num_replicas": replicas})
        except ApiError as error:
            raise _too_few_nodes(error, name, replicas) or error from error

    answer = await _tried(update)
    logger.info("stream gets more copies", extra={"action": "replicated", "stream": name, "replicas": replicas})
    return answer


class _TooFewNodesError(UnavailableError):
    """The cluster does not have as many nodes as a stream wants copies, yet."""


async def _tried(call: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    try:
        return await call_with_retry(call, deadline_s=_CREATE_S)
    except _TooFewNodesError as error:
        raise ConfigurationError(error.message, field="replicas", hint=error.hint) from error


def _too_few_nodes(error: ApiError, name: str, replicas: int) -> HoldfastError | None:
    hint = f"start {replicas} nodes with JetStream in one cluster, or set replicas lower"
    if error.err_code == _NOT_CLUSTERED:
        what = f"stream {name} cannot have {replicas} copies: the server is in no cluster"
        return ConfigurationError(what, field="replicas", hint=hint)
    if error.err_code == _NO_PEERS:
        what = f"stream {name} cannot have {replicas} copies: fewer nodes of the cluster are up and have room"
        return _TooFewNodesError(what, hint=hint)
    return None


def _info(answer: dict[str, Any]) -> StreamInfo:
    state = answer["state"]
    return StreamInfo(
        name=answer["config"]["name"],
        epoch=answer["config"].get("metadata", {}).get(EPOCH_KEY, ""),
        first_seq=state["first_seq"],
        last_seq=state["last_seq"],
        messages=state["messages"],
        bytes=state["bytes"],
        replicas=answer["config"].get("num_replicas", 1),
        epoch_start=int(answer["config"].get("metadata", {}).get(EPOCH_START_KEY, "1")),
        heads_archived=answer["config"].get("metadata", {}).get(HEADS_ARCHIVED_KEY) == "1",
        earlier=_earlier(answer["config"].get("metadata", {})),
    )


def _describe(differences: dict[str, tuple[object, object]]) -> str:
    return ", ".join(f"{setting} is {found!r}, not {declared!r}" for setting, (declared, found) in differences.items())
