"""The file of ``holdfast export``: one JSON object a line, told apart by ``type``.

===================  ==================================================================================================
type                 members
===================  ==================================================================================================
``holdfast-export``  the first line: ``v``, ``namespace``, ``prefix``, ``created_at``, ``holdfast`` (its release)
``context``          ``digest``, ``kind``, ``form`` (``manifest``, ``chunk``; absent: the whole body), ``content_type``
                     (absent: JSON), ``expires_at_ms``, and the body's exact bytes in one of ``body`` (JSON as it was
                     written), ``body_text``, ``body_base64``
``version``          one version of a key: ``key``, ``version``, ``op``, ``ref``, ``timestamp_ms``, ``stored_at_ms``,
                     tags and the other metadata of a version
``missing``          a reference of a version whose body could not be read while exporting, with ``code`` and ``reason``
``end``              the last line: ``keys``, ``versions``, ``contexts``, ``missing``, and ``digest``: BLAKE2b of 160
                     bits over every byte before this line, as 32 characters of base32 in lower case
===================  ==================================================================================================

Contexts stand in the form they are stored in: of a body in parts, each part is a ``chunk`` line, before the
``manifest`` that names it.  A context stands before the first version that refers to it, the versions of a key stand
together, oldest first.  Parts and contexts stand once as a rule; a repetition is harmless.

A member that is absent has its default.  Readers pass over members they do not know; a change that such a reader would
get wrong comes with another ``v``.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from importlib.metadata import version as installed_version
from typing import BinaryIO, Final, Literal

import msgspec

from holdfast.ops.export_files import FIRST_LINE, LINE_BYTES, UNREADABLE
from holdfast.schemas.bodies import check_content_type, check_json
from holdfast.schemas.errors import (
    DigestMismatchError,
    HoldfastError,
    InputError,
    IntegrityError,
    InvalidFieldError,
)
from holdfast.schemas.ids import iso_from_ms
from holdfast.schemas.names import check_key, check_namespace
from holdfast.schemas.refs import DIGEST_BYTES, JSON, Digest, digest_from_bytes, parse_ref
from holdfast.schemas.rows import ContextRow, KeyVersionRow
from holdfast.schemas.undecodable import UNDECODABLE
from holdfast.streams.codec import unseal
from holdfast.streams.decode import KeyVersionBody
from holdfast.streams.wire import H_EXPIRES, H_FORM, H_KIND, H_TYPE

FORMAT_VERSION: Final = 1

_TYPE: Final = "holdfast-export"
_PERSON: Final = b"holdfast-exp-1"


class Header(msgspec.Struct, tag=_TYPE, frozen=True, kw_only=True):
    """The first line.  ``prefix``: the beginning that all exported keys share."""

    v: int
    namespace: str
    prefix: str = ""
    created_at: str = ""
    holdfast: str = ""


class ContextLine(msgspec.Struct, tag="context", frozen=True, omit_defaults=True, kw_only=True):
    """A context in its stored form."""

    digest: str
    kind: str
    form: Literal["plain", "manifest", "chunk"] = "plain"
    content_type: str = JSON
    expires_at_ms: int | None = None
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    body_text: str | msgspec.UnsetType = msgspec.UNSET
    body_base64: bytes | msgspec.UnsetType = msgspec.UNSET


class VersionLine(KeyVersionBody, tag="version", omit_defaults=True, kw_only=True):
    """A version of a key: what its message says, and the key.  ``stored_at_ms`` tells when the server stored it."""

    key: str
    stored_at_ms: int = 0


class MissingLine(msgspec.Struct, tag="missing", frozen=True, kw_only=True):
    """A reference whose body could not be exported."""

    ref: str
    code: str
    reason: str


class End(msgspec.Struct, tag="end", frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The last line: what came before it.  It is under no digest, so there is nothing in it that is not checked."""

    keys: int
    versions: int
    contexts: int
    missing: int
    digest: str


Line = Header | ContextLine | VersionLine | MissingLine | End

_DECODER: Final[msgspec.json.Decoder[Line]] = msgspec.json.Decoder(Line)
_ENCODER: Final = msgspec.json.Encoder()


class ExportWriter:
    """Writes an export line by line; the file is complete once :meth:`finish` has returned.  Blocks on the file."""

    def __init__(self, file: BinaryIO, namespace: str, *, prefix: str = "", created_at_ms: int) -> None:
        self._file = file
        self._hasher = _hasher()
        self._last_key: str | None = None
        self.keys = 0
        self.versions = 0
        self.contexts = 0
        self.missing = 0
        self._write(
            Header(
                v=FORMAT_VERSION,
                namespace=namespace,
                prefix=prefix,
                created_at=iso_from_ms(created_at_ms),
                holdfast=installed_version("holdfast"),
            )
        )

    def write_context(self, row: ContextRow) -> None:
        """Writes a context in its stored form."""
        self._write(_context_line(row))
        self.contexts += 1

    def write_version(self, row: KeyVersionRow) -> None:
        """Writes a version; those of one key are to come together, oldest first."""
        self._write(version_line(row))
        self.versions += 1
        if row.key != self._last_key:
            self._last_key = row.key
            self.keys += 1

    def write_missing(self, ref: str, error: HoldfastError) -> None:
        """Notes that the body of a reference could not be read."""
        self._write(MissingLine(ref=ref, code=error.code, reason=error.message))
        self.missing += 1

    def finish(self) -> End:
        """Writes the closing line and returns it."""
        end = End(
            keys=self.keys,
            versions=self.versions,
            contexts=self.contexts,
            missing=self.missing,
            digest=digest_from_bytes(self._hasher.digest()),
        )
        self._file.write(_ENCODER.encode(end) + b"\n")
        return end

    def _write(self, line: Line) -> None:
        raw = _ENCODER.encode(line) + b"\n"
        self._hasher.update(raw)
        self._file.write(raw)


class Numbered(msgspec.Struct, frozen=True):
    """A line of a file, from 1, and what it holds: a context is checked against its digest, but for a manifest, whose
    digest is that of the body it describes."""

    number: int
    record: Header | ContextRow | KeyVersionRow | MissingLine | End


def read_export(file: BinaryIO, name: str) -> Iterator[Numbered]:
    """Yields the lines of an export, in order, the header first and the closing line last; blocks on the file.

    Raises InvalidFieldError when the file is none, or is of a later version; IntegrityError, naming the line, where it
    is damaged or cut short.  The running digest is compared at the end: what is yielded before is not yet known to be
    whole, though each body is.
    """
    hasher = _hasher()
    header: Header | None = None
    counts = _Counts()
    number = 0
    for number, raw in _raw_lines(file, name):
        line = _decoded(raw, name, number, is_first=header is None)
        if header is None:
            header = _checked_header(line, name)
            yield Numbered(number, header)
        elif isinstance(line, End):
            _check_end(line, counts, digest_from_bytes(hasher.digest()), name, number)
            _check_nothing_follows(file, name, number)
            yield Numbered(number, line)
            return
        else:
            record = _record(line, header.namespace, name, number)
            counts.add(record)
            yield Numbered(number, record)
        hasher.update(raw)
    if header is None:
        raise _foreign(name)
    raise IntegrityError(
        f"{name} ends after line {number} without its closing line: it is cut short",
        field=f"line {number}",
        hint="use a whole copy of the file; nothing after this point is in it",
    )


def version_line(row: KeyVersionRow) -> VersionLine:
    """Returns the line of a version."""
    return VersionLine(
        key=row.key,
        stored_at_ms=row.stored_at_ms,
        **{name: getattr(row, name) for name in _VERSION_FIELDS},
    )


class _Counts:
    def __init__(self) -> None:
        self.keys = self.versions = self.contexts = self.missing = 0
        self._last_key: str | None = None

    def add(self, record: ContextRow | KeyVersionRow | MissingLine) -> None:
        match record:
            case ContextRow():
                self.contexts += 1
            case KeyVersionRow():
                self.versions += 1
                self.keys += record.key != self._last_key
                self._last_key = record.key
            case MissingLine():
                self.missing += 1


_VERSION_FIELDS: Final = tuple(
    field.name for field in msgspec.structs.fields(KeyVersionBody) if field.name in KeyVersionRow.__struct_fields__
)


def _hasher() -> blake2b:
    return blake2b(digest_size=DIGEST_BYTES, person=_PERSON)


def _context_line(row: ContextRow) -> ContextLine:
    if row.form == "touch" or row.form == "joint":
        raise ValueError(f"a {row.form} has no bytes of its own")
    body: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    text: str | msgspec.UnsetType = msgspec.UNSET
    raw: bytes | msgspec.UnsetType = msgspec.UNSET
    if (row.form == "manifest" or row.content_type == JSON) and _fits_in_a_line(row.body):
        body = msgspec.Raw(row.body)
    else:
        try:
            text = row.body.decode()
        except UnicodeDecodeError:
            raw = row.body
    return ContextLine(
        digest=row.digest,
        kind=row.kind,
        form=row.form,
        content_type=row.content_type,
        expires_at_ms=row.expires_at_ms,
        body=body,
        body_text=text,
        body_base64=raw,
    )


def _fits_in_a_line(raw: bytes) -> bool:
    """Whether bytes are JSON that a line can hold as they are: a decoder gives back exactly them."""
    if b"\n" in raw or not raw or raw[:1].isspace() or raw[-1:].isspace():
        return False
    try:
        check_json(raw)
    except InputError:
        return False
    return True


def _raw_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    while True:
        number += 1
        try:
            raw = file.readline(LINE_BYTES + 1)
        except UNREADABLE as error:
            raise IntegrityError(
                f"{name} cannot be read beyond line {number}: {error}",
                field=f"line {number}",
                hint="the file is cut short or damaged; use a whole copy",
            ) from error
        if not raw:
            return
        if len(raw) > LINE_BYTES:
            raise _damaged(name, number, f"it has over {LINE_BYTES} bytes")
        yield number, raw


def _decoded(raw: bytes, name: str, number: int, *, is_first: bool) -> Line:
    if is_first and not FIRST_LINE.match(raw):
        raise _foreign(name)
    try:
        return _DECODER.decode(raw)
    except UNDECODABLE as error:
        # The last line of a file that is cut short has no end.
        what = str(error) if raw.endswith(b"\n") else "it is cut short"
        raise _damaged(name, number, what) from error


def _checked_header(line: Line, name: str) -> Header:
    if not isinstance(line, Header):
        raise _foreign(name)
    if line.v != FORMAT_VERSION:
        raise InvalidFieldError(
            f"{name} is an export of version {line.v}, this release reads {FORMAT_VERSION}",
            field="v",
            hint="upgrade holdfast",
        )
    check_namespace(line.namespace)
    return line


def _record(line: Line, namespace: str, name: str, number: int) -> ContextRow | KeyVersionRow | MissingLine:
    try:
        match line:
            case ContextLine():
                return _context_row(line, namespace)
            case VersionLine():
                return _version_row(line, namespace)
            case MissingLine():
                parse_ref(line.ref)
                return line
            case Header() | End():
                raise IntegrityError("it is a second beginning", field="type")
    except HoldfastError as error:
        chosen = DigestMismatchError if isinstance(error, DigestMismatchError) else IntegrityError
        raise chosen(
            f"line {number} of {name} is damaged: {error.message}",
            field=f"line {number}",
            hint="use another copy of the file; nothing of this line was taken",
        ) from error


def _context_row(line: ContextLine, namespace: str) -> ContextRow:
    given = [
        None if isinstance(line.body, msgspec.UnsetType) else bytes(line.body),
        None if isinstance(line.body_text, msgspec.UnsetType) else line.body_text.encode(),
        None if isinstance(line.body_base64, msgspec.UnsetType) else line.body_base64,
    ]
    bodies = [body for body in given if body is not None]
    if len(bodies) != 1:
        raise InvalidFieldError("it needs one of body, body_text, body_base64", field="body")
    # As a message of the hot tier it is checked by the same rules as any.
    headers = {H_KIND: line.kind, H_TYPE: check_content_type(line.content_type)}
    if line.form != "plain":
        headers[H_FORM] = line.form
    if line.expires_at_ms is not None:
        headers[H_EXPIRES] = str(line.expires_at_ms)
    return unseal(namespace, line.digest, headers, bodies[0], stored_at_ms=0)


def _version_row(line: VersionLine, namespace: str) -> KeyVersionRow:
    if line.ref is not None:
        parse_ref(line.ref)
    said = {name: getattr(line, name) for name in _VERSION_FIELDS}
    if line.timestamp_ms is None:
        said["timestamp_ms"] = line.stored_at_ms
    return KeyVersionRow(
        namespace=namespace, key=check_key(line.key), stored_at_ms=line.stored_at_ms, epoch="", seq=0, **said
    )


def _check_end(end: End, counts: _Counts, digest: Digest, name: str, number: int) -> None:
    if end.digest != digest:
        raise DigestMismatchError(
            f"{name} is damaged before line {number}: what stands there hashes to {digest}, "
            f"not to {end.digest[:40]} as that line says",
            field=f"line {number}",
            hint="use another copy of the file",
        )
    stated = (end.keys, end.versions, end.contexts, end.missing)
    found = (counts.keys, counts.versions, counts.contexts, counts.missing)
    if stated != found:
        raise _damaged(name, number, f"it counts {stated} keys, versions, contexts and missing ones; there are {found}")


def _check_nothing_follows(file: BinaryIO, name: str, number: int) -> None:
    try:
        rest = file.read(1)
    except UNREADABLE:
        rest = b"?"
    if rest:
        raise _damaged(name, number + 1, "the export has ended before it")


def _damaged(name: str, number: int, what: str) -> IntegrityError:
    return IntegrityError(
        f"line {number} of {name} is damaged: {what}",
        field=f"line {number}",
        hint="use another copy of the file; nothing of this line was taken",
    )


def _foreign(name: str) -> InvalidFieldError:
    return InvalidFieldError(
        f"{name} is not an export of Holdfast", field="path", hint="its first line is written by 'holdfast export'"
    )


__all__ = [
    "FORMAT_VERSION",
    "LINE_BYTES",
    "End",
    "ExportWriter",
    "Header",
    "MissingLine",
    "Numbered",
    "read_export",
    "version_line",
]
