"""The campaign against three nodes: leaders killed, nodes parted, all robbed of their power, one wiped::

    python -m tests.campaigns.cluster --rounds 30 --seed 1 --kind leader-kill,partition,all-cut --json
    python -m tests.campaigns.cluster --kind chaos --minutes 60 --load 0.3 --seed 1 --json

Each round: writers of every kind of thing, a fault, its end, and when the cluster is whole again everything that was
acknowledged is looked for.  Workers run beside it as a process of their own, archive, and purge what is archived.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

import msgspec

from tests.campaigns.cluster_campaign import Campaign
from tests.campaigns.cluster_plan import schedule_of
from tests.campaigns.cluster_rig import missing
from tests.campaigns.cluster_rounds import KINDS, Kind


def main() -> None:
    """Runs the campaign; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3, help="of each kind")
    parser.add_argument("--wipes", type=int, help="rounds of the kind wipe; as many as the others without it")
    parser.add_argument("--kind", default="leader-kill,partition,all-cut,wipe", help=f"of {', '.join(KINDS)}, or chaos")
    parser.add_argument("--minutes", type=float, default=1.0, help="how long chaos lasts")
    parser.add_argument("--load", type=float, default=0.3, help="share of the full load during chaos")
    parser.add_argument("--durability", choices=("durable", "fast"), default="durable", help="fast: it must lose some")
    parser.add_argument(
        "--data", type=Path, help="where everything is kept; else a folder that is removed if all is well"
    )
    parser.add_argument("--json", action="store_true", help="nothing but the line of JSON at the end")
    chosen = parser.parse_args()
    why = missing()
    if why is not None:
        sys.exit(why)
    kinds = chosen.kind.split(",")
    unknown = set(kinds) - {*KINDS, "chaos"}
    if unknown:
        sys.exit(f"no such kind: {', '.join(sorted(unknown))}")
    rounds = {kind: chosen.wipes if kind == "wipe" and chosen.wipes is not None else chosen.rounds for kind in kinds}
    folder = chosen.data or Path(tempfile.mkdtemp(prefix="holdfast-cluster-"))
    folder.mkdir(parents=True, exist_ok=True)
    # Told to end, it ends as by Ctrl-C, and takes its namespaces and disks away.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # What clients say of lost connections is what the campaign is about.
    logging.basicConfig(level=logging.CRITICAL)
    campaign = Campaign(chosen.seed, folder, rounds, durability=chosen.durability, quiet=chosen.json)
    if kinds == ["chaos"]:
        run = campaign.run([], minutes=chosen.minutes, load=chosen.load)
    else:
        run = campaign.run(schedule_of(chosen.seed, cast("dict[Kind, int]", rounds)))
    report = asyncio.run(run)
    shown: dict[str, Any] = msgspec.to_builtins(report)
    shown["violations"] = shown["violations"][:20]
    sys.stdout.write(json.dumps(shown) + "\n")
    if not report.violations and chosen.data is None:
        shutil.rmtree(folder, ignore_errors=True)
    sys.exit(1 if report.violations else 0)


if __name__ == "__main__":
    main()
