"""What the doctor says: sentences about the facts of a machine. Pure: looks at nothing but the facts."""

from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

from packaging.version import Version

from gearnn_ray.cli.machine import RAY_PORTS, Facts, Listener

TESTED = {
    "ray": "2.60.0", "torch": "2.15.0", "torchvision": "0.29.2", "numpy": "2.4.6", "pyarrow": "26.0.1", "av": "18.1.0",
    "ortools": "9.15.6755", "pydantic": "2.14.3", "safetensors": "0.8.0",
}  # fmt: skip
"""The versions that the tests ran with, as in pyproject.toml, which an installed package does not have."""

OLDEST = {
    "ray": "2.60", "torch": "2.9", "torchvision": "0.24", "numpy": "2.0", "pyarrow": "18", "av": "18", "ortools": "9.12",
    "pydantic": "2.10", "safetensors": "0.5",
}  # fmt: skip
"""The oldest versions that the package is installed with, as in pyproject.toml."""

_PYTHON = "3.11"
_GIB = 2**30
_LEAST_MEMORY = 2 * _GIB  # Ray, a driver and one worker that has imported torch
_LEAST_DISK = _GIB
_SKEW_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One sentence. state: fine; note: worth knowing; wrong: to be repaired."""

    state: Literal["fine", "note", "wrong"]
    what: str
    sentence: str


def diagnose(facts: Facts) -> list[Finding]:
    """Everything there is to say about a machine, in the order in which it is printed."""
    checks = (_cpu, _memory, _gpu, _python, _versions, _ports, _cluster, _store, _clock, _cache)
    return [finding for check in checks for finding in check(facts)]


def _cpu(facts: Facts) -> Iterator[Finding]:
    machine = f"{facts.processor}, {_count(facts.cores, 'core')} for this process"
    if facts.torch is None:
        yield Finding("note", "CPU", f"{machine}.")
        return
    features = " and ".join(facts.torch.cpu_features) or "none of AVX2, AVX512 and AMX"
    why = "" if facts.torch.precision == "bfloat16" else ", because it has neither AMX nor AVX512_BF16"
    yield Finding("fine", "CPU", f"{machine}, with {features}. Networks train in {facts.torch.precision} here{why}.")


def _memory(facts: Facts) -> Iterator[Finding]:
    have = f"{_gib(facts.available)} of {_gib(facts.memory)} are available"
    if facts.available < _LEAST_MEMORY:
        yield Finding("wrong", "memory", f"{have}, and a job needs at least {_gib(_LEAST_MEMORY)}: end other programs.")
    else:
        yield Finding("fine", "memory", f"{have}.")


def _gpu(facts: Facts) -> Iterator[Finding]:
    gpus = facts.torch.gpus if facts.torch else ()
    for gpu in gpus:
        precision = "bfloat16" if gpu.capability >= (8, 0) else "float32"
        yield Finding("fine", "GPU", f"{gpu.name} with {_gib(gpu.bytes)}. Networks train in {precision} there.")
    if facts.gpu_driver and facts.torch is not None and not gpus:
        yield Finding(
            "wrong", "GPU", "An NVIDIA driver is loaded, but torch sees no GPU: install a torch with CUDA that fits the driver."
        )
    elif not gpus:
        yield Finding("note", "GPU", "There is none. Networks train and serve on the CPU.")


def _python(facts: Facts) -> Iterator[Finding]:
    if Version(facts.python) < Version(_PYTHON):
        yield Finding("wrong", "Python", f"It is {facts.python}: install {_PYTHON} or newer.")
    else:
        yield Finding("fine", "Python", f"It is {facts.python} on {facts.system}.")


def _versions(facts: Facts) -> Iterator[Finding]:
    tested = []
    for name, pin in TESTED.items():
        found = facts.versions.get(name)
        if found is None:
            yield Finding("wrong", name, f"{name} is not installed: install gearnn-ray again.")
        elif Version(found) < Version(OLDEST[name]):
            yield Finding("wrong", name, f"{name} {found} is older than {OLDEST[name]}: install a newer version.")
        elif Version(found).public != pin:
            yield Finding("note", name, f"{name} is {found}. The tests ran with {pin}.")
        else:
            tested.append(f"{name} {found}")
    if facts.versions.get("torch") and facts.torch is None:
        yield Finding("wrong", "torch", "torch is installed, but Python cannot import it: install it again.")
    if tested:
        yield Finding("fine", "versions", f"As tested: {', '.join(tested)}.")


def _ports(facts: Facts) -> Iterator[Finding]:
    if facts.listeners is None:
        yield Finding("note", "ports", "This user may not see who listens on which port.")
        return
    for each in facts.listeners:
        if each.port == facts.port:
            yield _on_service_port(each)
        if each.port in RAY_PORTS:
            yield _on_ray_port(each, facts.guarded)
    taken = {each.port for each in facts.listeners}
    if free := [str(port) for port in dict.fromkeys((facts.port, *RAY_PORTS)) if port not in taken]:
        yield Finding("fine", "ports", f"Nobody listens on {', '.join(free)}.")


def _on_service_port(each: Listener) -> Finding:
    who = f"{_name(each)} listens on {each.address} port {each.port}"
    if _is_rays(each):
        return Finding("note", "ports", f"{who}: a service is running here.")
    return Finding("wrong", "ports", f"{who}, so gearnn serve cannot use it: end that program, or give another --port.")


def _on_ray_port(each: Listener, guarded: bool) -> Finding:
    who = f"{_name(each)} listens on {each.address} port {each.port} ({RAY_PORTS[each.port]})"
    if not _is_rays(each):
        return Finding("note", "ports", f"{who}: `ray start --head` would need another port.")
    if ip_address(each.address.partition("%")[0]).is_loopback:
        return Finding("fine", "ports", f"{who}: only this machine reaches it.")
    if guarded:
        return Finding("note", "ports", f"{who}: other machines reach it, and need the token if it was started with one.")
    return Finding(
        "wrong", "ports",
        f"{who}, and RAY_AUTH_MODE=token is not set here: Ray executes what anybody sends to this port. Start it with a token "
        "(docs/cluster.md), or on 127.0.0.1.",
    )  # fmt: skip


def _cluster(facts: Facts) -> Iterator[Finding]:
    if facts.joins is None:
        yield Finding("fine", "cluster", "A job starts a Ray of its own, on loopback and with a random token.")
    else:
        yield Finding("note", "cluster", f"A job joins the Ray {facts.joins}. RAY_ADDRESS=local gives it one of its own.")


def _store(facts: Facts) -> Iterator[Finding]:
    store = facts.store
    if store.problem is not None:
        yield Finding("wrong", "store", f"{store.uri} cannot be used: {store.problem.rstrip('.')}.")
    elif store.free is not None and store.free < _LEAST_DISK:
        yield Finding("wrong", "store", f"Only {_gib(store.free)} are free where {store.uri} is: make room.")
    else:
        room = "" if store.free is None else f" {_gib(store.free)} are free there."
        state = "can be read and written." if store.exists else "does not exist yet; the first job creates it."
        yield Finding("fine", "store", f"{store.uri} {state}{room}")


def _clock(facts: Facts) -> Iterator[Finding]:
    if facts.store.ahead is None:
        return
    ahead, error = facts.store.ahead
    if abs(ahead) - error > _SKEW_SECONDS:
        direction = "ahead of" if ahead > 0 else "behind"
        yield Finding(
            "wrong", "clock",
            f"The store's clock is {abs(ahead):.0f} s {direction} this machine's: jobs judge by it what is old enough to be "
            "deleted. Set both by NTP.",
        )  # fmt: skip
    else:
        yield Finding("fine", "clock", f"It agrees with the store's within {abs(ahead) + error:.0f} s.")


def _cache(facts: Facts) -> Iterator[Finding]:
    cache = facts.cache
    holds = f"{cache.folder} holds {_gib(cache.bytes)} of distorted images"
    if cache.free < _LEAST_DISK:
        yield Finding("wrong", "cache", f"{holds}, and only {_gib(cache.free)} are free there: delete old entries of it.")
    else:
        yield Finding("fine", "cache", f"{holds}; {_gib(cache.free)} are free there.")


def _is_rays(each: Listener) -> bool:
    return each.process is not None and each.process.startswith(("ray", "gcs_server"))


def _name(each: Listener) -> str:
    return each.process or "A process of another user"


def _gib(count: int) -> str:
    return f"{count / _GIB:.1f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
