"""`gearnn`: the jobs as the commands of one program.

    gearnn split --levels jpeg-10 jpeg-30
    gearnn serve --help

Knows the commands' names and where they are. A command's module is imported when it is run, because torch and Ray take seconds.
"""

import os
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import import_module, metadata

COMMANDS = {
    "split": "make a base and a small adaptor for each distortion level, and publish them",
    "sweep": "try several budgets M, and recommend one",
    "evaluate": "compare the release with every other method on the same images",
    "serve": "serve releases over HTTP",
    "watch": "take a video through the adaptive network",
    "adapt": "compare what can steer a camera's encoder",
    "camera": "be a camera whose encoder the service steers",
    "pull": "copy a release from another store, verified",
    "push": "copy a release to another store, verified",
    "export": "write the network of one level, or of all, as ONNX or torch.export",
    "sign": "sign a release",
    "verify": "read everything in a store, and say what is wrong",
    "gc": "delete what no tag leads to",
    "doctor": "say what this machine is good for, and what is wrong",
}
"""Every command, with what it does. `gearnn_ray.cli.main` has a function run_<command> for each."""


def main() -> int:
    """Run the command that the command line names, and return its exit code."""
    # as beside jobs/*.py, networks may lie in the working directory; last, so that nothing there hides an installed module
    sys.path.append(os.getcwd())
    try:
        return _main(sys.argv[1:])
    except KeyboardInterrupt:  # while modules were imported
        print("error: interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def _main(arguments: Sequence[str]) -> int:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if name == "--version":
        print(f"gearnn_ray {metadata.version('gearnn-ray')}")
        return 0
    if name not in COMMANDS:
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else "gearnn --help lists the commands"
        print(f"error: gearnn has no command {name!r}: {hint}", file=sys.stderr)
        return 2
    sys.argv[0] = f"gearnn {name}"  # for the usage in its --help
    run: Callable[[Sequence[str]], int] = getattr(import_module("gearnn_ray.cli.main"), f"run_{name}")
    return run(rest)


def _help() -> str:
    lines = (f"  {name:<10}{what}" for name, what in COMMANDS.items())
    return "\n".join(["usage: gearnn COMMAND [OPTIONS]", "", *lines, "", "gearnn COMMAND --help lists the options of a command."])
