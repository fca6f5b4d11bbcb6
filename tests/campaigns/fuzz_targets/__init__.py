"""What the fuzz campaign feeds: one target for each way in, with what must hold whatever comes.

A target makes an input from a random generator and checks it.  A check returns what became of the input; a typed error
of Holdfast's is an answer like another, any other exception is a violation, and so is a broken property
(AssertionError).  Holds no tests itself.
"""

from __future__ import annotations

from typing import Final

from tests.campaigns.fuzz_targets.bodies import check_body, check_envelope, make_body, make_envelope
from tests.campaigns.fuzz_targets.frames import Sink, check_frames, check_headers, header_block, make_frames
from tests.campaigns.fuzz_targets.messages import check_event, check_version, make_event, make_version
from tests.campaigns.fuzz_targets.names import check_names, check_ref, make_name, make_ref
from tests.campaigns.fuzz_targets.requests import (
    REQUESTS,
    check_filter,
    check_request,
    make_filter,
    make_request,
    request_value,
)
from tests.campaigns.fuzz_targets.settings import TOML, check_toml, make_toml
from tests.campaigns.fuzz_targets.target import Target, drive, told

TARGETS: Final[dict[str, Target]] = {
    target.name: target
    for target in (
        Target("refs", make_ref, check_ref, 1.0),
        Target("names", make_name, check_names, 1.0),
        Target("events", make_event, check_event, 2.0),
        Target("keys", make_version, check_version, 1.0),
        Target("bodies", make_body, check_body, 1.0),
        Target("envelopes", make_envelope, check_envelope, 1.0),
        Target("requests", make_request, check_request, 1.5),
        Target("filters", make_filter, check_filter, 0.7),
        Target("frames", make_frames, check_frames, 1.5),
        Target("headers", header_block, check_headers, 1.0),
        Target("toml", make_toml, check_toml, 0.3),
    )
}
"""Every target, by name, in the order of the campaign."""

__all__ = [
    "REQUESTS",
    "TARGETS",
    "TOML",
    "Sink",
    "Target",
    "drive",
    "header_block",
    "make_envelope",
    "make_version",
    "request_value",
    "told",
]
