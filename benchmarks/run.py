"""Headwater beside its peers on this machine, in one run: prints tables with ratios.

    python benchmarks/run.py                               everything, peers where they are installed (make bench): about 40 minutes on two cores
    python benchmarks/run.py ekfac_mlp graddot             some of: ekfac_mlp, graddot, scaling, gpt2, trak_dattri, index, unrolled, diffusion,
                                                           diffusion_speed, explain_networks, explain_accuracy, explain_trees, explain_interactions
    python benchmarks/run.py --tiny                        the same in miniature, to see that it works: its times mean nothing
    python benchmarks/run.py --write                       put what is printed into benchmarks/RESULTS.md too, each part in its place

Every contestant runs in a fresh process on one thread, in alternation, --repeats times; medians are shown. CPU seconds (user and
system, of all threads and children) are what to compare on a machine that does other things at the same time. Peak memory is the
largest resident set: of the whole process, and above the baseline after importing torch and the library and loading data and model.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import gpu_gpt2
from speed import ekfac_mlp, explain_accuracy, explain_networks, graddot, scaling
from speed.tables import machine

HERE = Path(__file__).resolve().parent


def script(name: str, title: str) -> Callable[[Path, bool, int], str]:
    """A part that is a script of its own: what it prints."""

    def measure(place: Path, tiny: bool, repeats: int) -> str:
        command = [sys.executable, str(HERE / f"{name}.py"), "--repeats", str(repeats), *["--tiny"] * tiny]
        return f"### {title}\n\n{subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.replace('### ', '#### ')}"

    return measure


PARTS: dict[str, Callable[[Path, bool, int], str]] = {
    "ekfac_mlp": ekfac_mlp.measure,
    "graddot": graddot.measure,
    "scaling": scaling.measure,
    "gpt2": gpu_gpt2.measure,
    "trak_dattri": script("trak_dattri", "TRAK"),
    "index": script("index", "The eigenbasis index"),
    "unrolled": script("unrolled", "Exact unrolling"),
    "diffusion": script("diffusion", "What attribution of diffusion models is worth"),
    "diffusion_speed": script("diffusion_speed", "Attribution of diffusion models"),
    "explain_networks": explain_networks.measure,
    "explain_accuracy": explain_accuracy.measure,
    "explain_trees": script("explain_trees", "Explanations of trees"),
    "explain_interactions": script("explain_interactions", "Interactions"),
}
RESULTS = HERE / "RESULTS.md"
MEANING = __doc__.split("\n\n")[-1].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--place", type=Path, help="keep the contestants' files (weights, scores) here")
    given = parser.parse_args()
    unknown = [name for name in given.parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory(prefix="headwater-bench-") as folder:
        for name in given.parts or PARTS:
            made = PARTS[name]((given.place or Path(folder)) / name, given.tiny, given.repeats)
            text = f"{made}\n{machine()}; {given.repeats} runs{', in miniature' * given.tiny}.\n"
            print(text, flush=True)
            if given.write:
                write(name, text)


def write(name: str, text: str) -> None:
    """Put a part between its marks in RESULTS.md, at the end where it is new."""
    head = f"# How fast: measured\n\nWritten by `make bench ARGS=--write`. {MEANING}\n"
    page = RESULTS.read_text() if RESULTS.exists() else head
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    part = f"{marks[0]}\n{text}{marks[1]}\n"
    known = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}\n", re.DOTALL)
    RESULTS.write_text(known.sub(lambda _: part, page) if known.search(page) else f"{page}\n{part}")


if __name__ == "__main__":
    main()
