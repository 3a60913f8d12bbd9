"""What the doctor looks at: facts about this machine, gathered within seconds. Starts no Ray, and judges nothing."""

import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit, urlunsplit

import psutil
from pyarrow import fs

from gearnn_ray.cli.early_checks import starts_own_cluster
from gearnn_ray.config.doctor import DoctorConfig
from gearnn_ray.core.errors import UserError
from gearnn_ray.store.patience import open_s3
from gearnn_ray.store.releases import Store

RAY_PORTS = {6379: "Ray's control service", 8265: "Ray's dashboard", 10001: "Ray's client server"}
"""Ports that `ray start --head` uses by itself. A Ray that a job starts uses free ports on loopback."""

_STORE_SECONDS = 10.0
_CPU_FEATURES = {
    "AMX": "_is_amx_tile_supported", "AVX512_BF16": "_is_avx512_bf16_supported", "AVX512": "_is_avx512_supported",
    "AVX2": "_is_avx2_supported",
}  # fmt: skip
_T = TypeVar("_T")


@dataclass(frozen=True)
class Gpu:
    """A GPU as torch sees it. capability: CUDA's compute capability."""

    name: str
    bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True)
class Torch:
    """What torch says about this machine. precision: bfloat16 or float32, what the CPU gains from."""

    cpu_features: tuple[str, ...]
    precision: str
    gpus: tuple[Gpu, ...]


@dataclass(frozen=True)
class Listener:
    """A process that accepts connections. process: its name, None if this user may not know it."""

    port: int
    address: str
    process: str | None


@dataclass(frozen=True)
class StoreFacts:
    """A store. problem: why it cannot be used, one sentence. ahead: seconds by which its clock is ahead of this machine's, with
    the seconds that this may be wrong by; None if it could not be measured. free: bytes on its disk, None for S3.
    """

    uri: str
    exists: bool = True
    problem: str | None = None
    ahead: tuple[float, float] | None = None
    free: int | None = None


@dataclass(frozen=True)
class CacheFacts:
    """The cache of distorted images: its size, and the free bytes of its disk."""

    folder: str
    bytes: int
    free: int


@dataclass(frozen=True)
class Facts:
    """A machine. cores: those that this process may use. memory, available: bytes, limits of a container included.
    versions: of installed distributions, None if missing. torch: None if it cannot be imported. gpu_driver: whether an NVIDIA
    driver is loaded. joins: the cluster that a job would join; None if it would start a Ray of its own.
    """

    python: str
    system: str
    processor: str
    cores: int
    memory: int
    available: int
    versions: Mapping[str, str | None]
    torch: Torch | None
    gpu_driver: bool
    listeners: tuple[Listener, ...] | None
    port: int
    guarded: bool
    joins: str | None
    store: StoreFacts
    cache: CacheFacts


def gather(config: DoctorConfig, packages: Mapping[str, str]) -> Facts:
    """The facts. packages: the distributions whose versions are asked for are its keys."""
    store = _in_time(lambda: _store(config.store), _STORE_SECONDS)  # while torch is imported
    memory, available = _memory()
    return Facts(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        processor=_processor(),
        cores=_cores(),
        memory=memory,
        available=available,
        versions={name: _version(name) for name in packages},
        torch=_torch(),
        gpu_driver=Path("/proc/driver/nvidia/version").exists(),
        listeners=_listeners({config.port, *RAY_PORTS}),
        port=config.port,
        guarded=os.environ.get("RAY_AUTH_MODE") == "token",
        joins=_joins(),
        cache=_cache(Path(config.cache).expanduser()),
        store=store() or StoreFacts(config.store, problem=f"it did not answer within {_STORE_SECONDS:g} seconds"),
    )


def _torch() -> Torch | None:
    try:
        import torch

        from gearnn_ray.training.precision import fastest_precision
    except (ImportError, OSError):  # not installed, or a library of its own is missing
        return None
    features = tuple(name for name, has in _CPU_FEATURES.items() if getattr(torch.cpu, has, lambda: False)())
    gpus = []
    for number in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(number)
        gpus.append(Gpu(found.name, found.total_memory, (found.major, found.minor)))
    return Torch(features, fastest_precision(torch.device("cpu")), tuple(gpus))


def _version(distribution: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return None


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """Total and available memory in bytes; what a control group allows, where that is less."""
    machine = psutil.virtual_memory()
    with suppress(OSError, ValueError):  # no limit is the word "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        return min(machine.total, limit), max(0, min(machine.available, limit - used))
    return machine.total, machine.available


def _listeners(ports: set[int]) -> tuple[Listener, ...] | None:
    """Who listens on these ports; None if this user may not know. A process that listens on IPv4 and IPv6 is there twice."""
    try:
        connections = psutil.net_connections("inet")
    except psutil.AccessDenied:
        return None
    found = set()
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port in ports:
            name = None
            with suppress(psutil.Error):
                name = None if connection.pid is None else psutil.Process(connection.pid).name()
            found.add(Listener(connection.laddr.port, connection.laddr.ip, name))
    return tuple(sorted(found, key=lambda each: (each.port, each.address)))


def _joins() -> str | None:
    if starts_own_cluster():
        return None
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    with suppress(OSError):
        return Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    return "of this machine"


def _store(address: str) -> StoreFacts:
    try:
        store = Store(_impatient(address))
        store.check_writable()
        if store.uri.startswith("s3://"):
            return StoreFacts(address, ahead=_ahead(*open_s3(store.uri)[:2]))
        if "://" in store.uri:
            return StoreFacts(store.uri)
        folder = _nearest_existing(Path(store.uri))
        free = psutil.disk_usage(str(folder)).free
        return StoreFacts(store.uri, Path(store.uri).exists(), None, _ahead(fs.LocalFileSystem(), str(folder)), free)
    except UserError as error:
        return StoreFacts(address, problem=str(error))


def _impatient(address: str) -> str:
    """The address, with a single attempt for each request if it is in the network."""
    parts = urlsplit(address)
    others = (option for option in parts.query.split("&") if option and not option.startswith("patience="))
    return urlunsplit(parts._replace(query="&".join((*others, "patience=0")))) if parts.scheme == "s3" else address


def _ahead(files: fs.FileSystem, folder: str) -> tuple[float, float] | None:
    """Seconds by which the clock that stamps files in this folder is ahead of this machine's, and the error of this number."""
    probe = f"{folder.rstrip('/')}/.tmp-{socket.gethostname()}-{os.getpid()}"
    try:
        before = time.time()
        with files.open_output_stream(probe) as file:
            file.write(b"clock")
        after = time.time()
        written = files.get_file_info(probe).mtime_ns
        files.delete_file(probe)
    except OSError:
        return None
    # S3 stamps whole seconds
    return (written / 1e9 - (before + after) / 2, (after - before) / 2 + 1) if written else None


def _cache(folder: Path) -> CacheFacts:
    sizes = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # another job has deleted it
            sizes += path.stat().st_size if path.is_file() else 0
    return CacheFacts(str(folder), sizes, psutil.disk_usage(str(_nearest_existing(folder))).free)


def _nearest_existing(path: Path) -> Path:
    return next(each for each in (path.absolute(), *path.absolute().parents) if each.exists())


def _in_time(work: Callable[[], _T], seconds: float) -> Callable[[], _T | None]:
    """Begin the work in a thread that keeps no process alive. The function returned waits for its result until so many seconds
    have passed since the beginning, and returns None where it is not there.
    """
    results: list[_T] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    until = time.monotonic() + seconds

    def result() -> _T | None:
        thread.join(max(0.0, until - time.monotonic()))
        return results[0] if results else None

    return result
