#!/usr/bin/env python3
"""A campaign of faults: processes killed and stopped, disks full, bits flipped, stores and clients that misbehave.

    uv run benchmarks/chaos.py [LINE ...] [--runs N] [--seed 0] [--state FOLDER]

Each LINE is a fault (`--list` names them; by default all). Each run draws its moments from (seed, line, number of the run). What
was done stands in the folder of --state, so that the same command goes on where it was ended. Ends with the table of all that
is there, and with code 1 where a run failed, or saw a digest that differs, an object torn or lost, or a silent error.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.faults import LINES  # noqa: E402
from benchmarks.faults.campaign import campaign, finished, sound, table  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="LINE")
    parser.add_argument("--list", action="store_true", help="name the lines, and how many runs the whole campaign has of each")
    parser.add_argument("--runs", type=int, help="of each line at most (default: the line's own number)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=Path("chaos"), help="folder of the outcomes")
    arguments = parser.parse_args()
    if unknown := set(arguments.lines) - {line.name for line in LINES}:
        parser.error(f"there is no line {', '.join(sorted(unknown))}; `--list` names those that there are")
    chosen = [line for line in LINES if not arguments.lines or line.name in arguments.lines]
    if arguments.list:
        print("\n".join(f"{line.name:24} {line.runs:7,}  {line.fault}" for line in LINES))
        return 0
    for line, run in campaign(chosen, arguments.seed, arguments.runs, arguments.state):
        said = run.error or (run.outcome and run.outcome.note) or "ok"
        print(f"{line.name} {run.index}: {run.seconds:.1f} s, {said}", flush=True)
    print(table(LINES, arguments.state))
    return 0 if all(sound(finished(arguments.state / f"{line.name}.jsonl")) for line in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
