"""A Ray of the job's own, which listens on loopback only and answers no request without its random token, because Ray executes
the pickles that reach its ports. A cluster that a job joins (RAY_ADDRESS, `ray job submit`) keeps its own rules.
"""

import logging
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from ipaddress import ip_address
from typing import Any

import grpc
import ray
from ray._private import ray_constants, services

from gearnn_ray.core.errors import UserError

INSECURE = "GEARNN_RAY_INSECURE"
"""Environment variable that switches both guards off if it is 1; the job then prints a warning."""

_OLDEST = "2.60"  # the oldest version whose guards the tests have seen
_LOG = logging.getLogger(__name__)
_Door = tuple[int, str, int]  # process, address, port


def address_to_join() -> str | None:
    """The cluster that `ray.init` would join; None where it would start a Ray of its own."""
    find: Any = services.get_ray_address_from_environment
    address: str | None = find(None, None)
    return None if address == "local" else address


@dataclass(frozen=True)
class LocalRay:
    """A running Ray. joining: environment variables with which another process can join; contains the token. before: sockets that
    listened on other addresses before it started; None if the guards are off.
    """

    joining: Mapping[str, str] = field(repr=False)
    before: frozenset[_Door] | None

    def check_listening(self, besides: int | None = None) -> None:
        """Raise UserError if a process of this Ray listens on more than loopback; port `besides` is exempt."""
        for pid, address, port in _open_doors() - self.before if self.before is not None else ():
            if port != besides:
                raise _unguarded(f"listens on {address} port {port} (process {pid})")


@contextmanager
def local_ray(**options: Any) -> Iterator[LocalRay]:
    """A Ray on this machine while the context lasts; `options` are those of `ray.init`. Raises UserError, with nothing left
    running, if one of the guards does not work with this version of Ray.
    """
    if os.environ.get(INSECURE) == "1":
        _LOG.warning("%s=1: this Ray may listen on every address and executes what anybody sends to it", INSECURE)
        ray.init("local", **options)
        try:
            yield LocalRay({"RAY_ADDRESS": ray.get_runtime_context().gcs_address}, None)
        finally:
            ray.shutdown()
        return
    before, guarded = _open_doors(), _guarded(secrets.token_hex(32))
    clusters = ray_constants.ENABLE_RAY_CLUSTER
    try:
        # `ray.init` starts Ray's processes, which inherit the environment; no later process needs the token.
        with _environment(guarded):
            ray_constants.ENABLE_RAY_CLUSTER = False  # read at import
            _read_environment_again()
            # no dashboard: it would be one more server, and ask for a token that its user does not have
            ray.init("local", **{"include_dashboard": False, **options})
        guarded["RAY_ADDRESS"] = address = ray.get_runtime_context().gcs_address
        own = LocalRay({name: value for name, value in guarded.items() if value is not None}, before)
        own.check_listening()
        _check_token(address)
        yield own
    finally:
        ray.shutdown()
        ray_constants.ENABLE_RAY_CLUSTER = clusters
        _read_environment_again()


def bind_replica_to_its_node() -> None:
    """Call in a Serve replica before it listens: on a node on loopback, its port is on loopback too. Serve opens that port on
    every address, and has no setting for it. A replica of a real cluster is not changed.
    """
    node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if not ip_address(node).is_loopback:
        return
    replica: Any = import_module("ray.serve._private.replica")
    # since Ray 2.58; older versions open the port in another way, and do not ask for a token
    if (add_port := getattr(replica, "add_port_to_grpc_server", None)) is None:
        raise _unguarded("opens the ports of replicas on every address")
    replica.add_port_to_grpc_server = lambda server, _: add_port(server, f"{node}:0")


def _guarded(token: str) -> dict[str, str | None]:
    """Environment variables of Ray's processes; None: removed."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_AUTH_TOKEN_PATH": None,
        "RAY_ENABLE_K8S_TOKEN_AUTH": "0",  # with 1, Kubernetes would verify tokens
        # without clusters, Ray opens all ports on loopback; the variable is named after the systems where this is the default
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
    }


def _read_environment_again() -> None:
    """Ray's core reads its settings and the token once per process."""
    core: Any = import_module("ray._raylet")
    try:
        core.Config.initialize("")
        core.AuthenticationTokenLoader.instance().reset_cache()
    except AttributeError as error:
        raise _unguarded("has no tokens") from error


def _check_token(address: str) -> None:
    """Send a request without the token: a later version of Ray may ignore one of the settings."""
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=10)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
    raise _unguarded("answers without its token")


def _open_doors() -> frozenset[_Door]:
    """Sockets on which this process and its descendants listen, except on loopback."""
    import psutil  # part of Ray

    found = set[_Door]()
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            for door in process.net_connections("inet"):
                if door.status == psutil.CONN_LISTEN and not _is_loopback(door.laddr.ip):
                    found.add((process.pid, door.laddr.ip, door.laddr.port))
    return frozenset(found)


def _is_loopback(address: str) -> bool:
    ip = ip_address(address)
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def _unguarded(what: str) -> UserError:
    return UserError(
        f"Ray {ray.__version__} {what}, so this job starts none of its own: install ray>={_OLDEST}, join a cluster "
        f"(RAY_ADDRESS), or set {INSECURE}=1 where nobody else can reach this machine"
    )


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    _set(changes)
    try:
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
