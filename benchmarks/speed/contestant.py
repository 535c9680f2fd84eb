"""One contestant in a process of its own: ``python contestant.py MODULE:FUNCTION PLACE ARGUMENTS`` prints what it cost as JSON."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent


def run(what: str, place: Path, threads: int = 1, **arguments: Any) -> dict[str, Any]:
    """Call ``MODULE:FUNCTION`` of this folder's package in a fresh process with so many threads; its report."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS"), str(threads))
    command = [sys.executable, str(FOLDER / "contestant.py"), what, str(place), json.dumps(arguments)]
    done = subprocess.run(command, env={**os.environ, **one}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} {arguments} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    what, place, arguments = sys.argv[1:4]
    sys.path.insert(0, str(FOLDER.parent))
    module, function = what.split(":")
    print(json.dumps(getattr(importlib.import_module(f"speed.{module}"), function)(Path(place), **json.loads(arguments))))


if __name__ == "__main__":
    main()
