"""Says what this machine and environment have, as tables to paste into a bug report.

    python tools/env_report.py            # Markdown
    python tools/env_report.py --json

Optional libraries are imported only where a GPU is; one that does not work is listed with the reason. A run writes the same to environment.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from typing import Any

from megapref.display import markdown_table
from megapref.mcore import capabilities
from megapref.runlog import environment_report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    options = parser.parse_args(arguments)
    report = full_report()
    print(json.dumps(report, indent=2) if options.json else tables(report))
    return 0


def full_report() -> dict[str, Any]:
    """What environment.json of a run holds, and the machine."""
    machine = {"system": platform.platform(), "processors": os.cpu_count(), "machine": platform.machine()}
    return environment_report() | {"machine": machine} | capabilities.report()


def tables(report: dict[str, Any]) -> str:
    """The report as Markdown: what there is, optional libraries, kernels."""
    commit = f"{report['git_commit'] or 'none'}{' with changes' if report['git_dirty'] else ''}"
    found = {**report["machine"], "python": report["python"], "commit": commit, **report["versions"]}
    gpus = [f"{gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['compute_capability']}" for gpu in report["device"]["gpus"]]
    found |= {**report["device"], "gpus": "; ".join(gpus) or "none"}
    kernels = [{"operation": operation, **kernel} for operation, kernel in report["kernels"].items()]
    parts = (
        _rows("environment", "value", found),
        _rows("optional library", "state", report["libraries"]),
        markdown_table(kernels),
    )
    return "\n\n".join(parts)


def _rows(name: str, value: str, entries: dict[str, Any]) -> str:
    return markdown_table([{name: key, value: "none" if entry is None else entry} for key, entry in entries.items()])


if __name__ == "__main__":
    sys.exit(main())
