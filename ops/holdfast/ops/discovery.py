"""Which NATS server the command line and the workers use: the shared order of ``holdfast.streams.discovery``, with
the merged settings as what the caller asks for."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from holdfast.ops.settings import LoadedSettings
from holdfast.streams.connection_target import ConnectionTarget
from holdfast.streams.discovery import find_connection


def resolve_connection(
    loaded: LoadedSettings, *, local: bool = False, environ: Mapping[str, str] | None = None
) -> ConnectionTarget | None:
    """Returns the server that the settings name, else that of ``NATS_URL`` or ``NATS_CONTEXT``, else None.

    ``holdfast up`` starts an embedded server on None.  With ``local``, as other commands want it, a server that
    already runs on the data directory comes before None.  Raises ConfigurationError when what is named cannot be
    used.
    """
    settings, sources = loaded.settings, loaded.sources
    target = find_connection(
        url=settings.nats_url,
        url_origin=sources["nats_url"],
        context=settings.nats_context,
        context_origin=sources["nats_context"],
        creds=settings.nats_creds,
        creds_origin=sources["nats_creds"],
        data=settings.data_path,
        environ=environ,
        local=local,
    )
    if target is None or settings.nats_monitor_url is None or target.monitor_url is not None:
        return target
    return msgspec.structs.replace(target, monitor_url=settings.nats_monitor_url)
