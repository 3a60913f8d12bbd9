"""Ray Train's torch workers on a Ray of our own: what they open for each other is on loopback too."""

import os
import socket
import sys
from functools import partial
from importlib import import_module
from ipaddress import ip_address
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend


class LoopbackTorchConfig(TorchConfig):
    """As TorchConfig; where the node is on loopback, so are the store and the connections of the process group."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_stay_on_loopback)
        super().on_start(worker_group, backend_config)


def _stay_on_loopback() -> None:
    """In a worker, before its process group is made. torch's store listens on every address, whatever it is told."""
    node: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    if not ip_address(node).is_loopback:
        return
    interface = "lo0" if sys.platform == "darwin" else "lo"
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    rendezvous: Any = import_module("torch.distributed.rendezvous")
    if not isinstance(rendezvous.TCPStore, partial):
        rendezvous.TCPStore = partial(_loopback_store, rendezvous.TCPStore)


def _loopback_store(make: Any, host_name: str, port: int, is_master: bool, **options: Any) -> Any:
    if is_master:  # a store listens on a socket that it is given
        family = socket.AF_INET6 if ":" in host_name else socket.AF_INET
        with socket.create_server((host_name, port), family=family, backlog=128) as server:
            options["master_listen_fd"] = server.detach()
    return make(host_name=host_name, port=port, is_master=is_master, **options)
