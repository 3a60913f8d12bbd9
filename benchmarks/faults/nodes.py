"""A Ray of several nodes on one machine, as a program that runs jobs one after the other; its nodes come and go as told.

    python -m benchmarks.faults.nodes processes | unshare -rn python -m benchmarks.faults.nodes hosts

`processes`: nodes of `ray.cluster_utils`, all on loopback, with one CPU each. `hosts`: three nodes with one CPU each and a head
without any, which have an address and a network namespace of their own. Reads JSON lines: {"job": ARGUMENTS} starts a job,
{"add": true} adds a node, {"lose": true} takes the one that was added: kills it and whatever it had started by SIGKILL, or, of
hosts, cuts its cable. Prints the jobs' events, and one of its own when each of these is done. Ends with its input.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import ray

from gearnn_ray.cli.main import run_split
from tests import tiny
from tests.running_jobs import kill_all


class Nodes(Protocol):
    address: str

    def add(self) -> None: ...

    def lose(self) -> None: ...

    def end(self) -> None: ...


class Processes:
    """Nodes of `ray.cluster_utils`."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        self.address: str = self._cluster.address
        self._added: Any = None

    def add(self) -> None:
        self._added = self._cluster.add_node(num_cpus=1)

    def lose(self) -> None:
        (raylet,) = self._added.all_processes["raylet"]
        started = psutil.Process(raylet.process.pid).children(recursive=True)
        self._cluster.remove_node(self._added, allow_graceful=False)
        kill_all(started)

    def end(self) -> None:
        self._cluster.shutdown()


class Hosts:
    """Network namespaces below this one, joined by a bridge, on which the head has the address 10.77.0.1."""

    address = "10.77.0.1:6379"

    def __init__(self) -> None:
        self._hosts: list[subprocess.Popen[str]] = []
        self._cut: subprocess.Popen[str] | None = None
        ip("link", "set", "lo", "up")
        ip("link", "add", "bridge0", "type", "bridge")
        ip("address", "add", "10.77.0.1/24", "dev", "bridge0")
        ip("link", "set", "bridge0", "up")
        self._head = _ray_start(
            "--head", "--node-ip-address=10.77.0.1", "--port=6379", "--num-cpus=0", "--include-dashboard=false"
        )
        self.add()
        self.add()

    def add(self) -> None:
        if self._cut is not None:
            _end(self._cut)  # its raylet may wait for the others for a minute
        number = len(self._hosts) + 2
        # a host begins when its end of the cable is there
        commands = f"read go; ip link set lo up; ip address add 10.77.0.{number}/24 dev host{number}; ip link set host{number} up"
        start = ("--address=10.77.0.1:6379", f"--node-ip-address=10.77.0.{number}", "--num-cpus=1")
        host = _ray_start(*start, before=["unshare", "-n", "sh", "-c", f'{commands}; exec "$@"', "sh"])
        assert host.stdin is not None
        while os.readlink(f"/proc/{host.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)
        ip("link", "add", f"cable{number}", "type", "veth", "peer", "name", f"host{number}", "netns", str(host.pid))
        ip("link", "set", f"cable{number}", "master", "bridge0", "up")
        host.stdin.write("go\n")
        host.stdin.flush()
        self._hosts.append(host)

    def lose(self) -> None:
        ip("link", "set", f"cable{len(self._hosts) + 1}", "down")
        self._cut = self._hosts[-1]

    def end(self) -> None:
        for process in (*self._hosts, self._head):
            _end(process)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _ray_start(*arguments: str, before: Sequence[str] = ()) -> "subprocess.Popen[str]":
    ray_program = str(Path(sys.executable).parent / "ray")
    return subprocess.Popen(
        [*before, ray_program, "start", *arguments, "--block", "--disable-usage-stats"],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


def _end(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        kill_all(psutil.Process(process.pid).children(recursive=True))
    process.kill()
    process.wait()


def connect(address: str, nodes: int) -> None:
    """Join the cluster, and wait until it has so many nodes."""
    deadline = time.monotonic() + 240
    while not ray.is_initialized():
        with contextlib.suppress(ConnectionError):
            # the driver is on the head, whose address cannot be found out without a way to the internet
            head = address.partition(":")[0]
            ray.init(address=address, _node_ip_address=head, log_to_driver=False, logging_level="critical")
        assert time.monotonic() < deadline, "Ray did not start within four minutes"
    await_nodes(nodes)


def await_nodes(count: int) -> None:
    deadline = time.monotonic() + 240
    while sum(node["Alive"] for node in ray.nodes()) < count:  # type: ignore[no-untyped-call]
        assert time.monotonic() < deadline, f"there were no {count} nodes within four minutes"
        time.sleep(0.1)


def main() -> None:
    hosts = sys.argv[1] == "hosts"
    nodes: Nodes = Hosts() if hosts else Processes()
    least = 3 if hosts else 1

    def run(arguments: Sequence[str]) -> None:
        say("job ended", code=run_split([*arguments, "--json"]))

    try:
        connect(nodes.address, least)
        say("ready")
        with tiny.without_figures(tiny.SPLIT_FIGURES):
            for text in sys.stdin:
                told = json.loads(text)
                if "job" in told:
                    threading.Thread(target=run, args=(told["job"],), daemon=True).start()
                elif "add" in told:
                    nodes.add()
                    await_nodes(least + 1)
                    say("added")
                else:
                    nodes.lose()
                    say("lost")
        ray.shutdown()
    finally:
        nodes.end()


def say(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


if __name__ == "__main__":
    main()
