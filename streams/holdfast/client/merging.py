"""JSON Merge Patch (RFC 7386): the change that ``patch`` applies."""

from __future__ import annotations

from typing import Any, cast


def merge_patch(target: Any, patch: Any) -> Any:
    """Returns ``target`` with ``patch`` merged into it; neither is changed.

    Members of an object are merged one by one, a null removes one; anything else replaces what was there, arrays too.
    """
    if not isinstance(patch, dict):
        return patch
    merged: dict[str, Any] = dict(cast("dict[str, Any]", target)) if isinstance(target, dict) else {}
    for name, value in cast("dict[str, Any]", patch).items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = merge_patch(merged.get(name), value)
    return merged
