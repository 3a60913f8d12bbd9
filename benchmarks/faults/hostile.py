"""Stores that somebody has forged: each is refused in a sentence, before it costs time or memory."""

import functools
import io
import json
import os
import random
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.faults.campaign import Line, Outcome, lasting_folder
from benchmarks.faults.memory import peak_reset, peak_since
from gearnn_ray.core.errors import UserError
from gearnn_ray.serving.adaptive_model import AdaptiveModel
from gearnn_ray.store.releases import Store
from tests.stores import TABLE, Folder, content_of, forge, manifest_of, table

MOST_SECONDS, MOST_BYTES = 0.1, 64 * 2**20  # of CPU time and further memory until a forged store is refused
TIB = 2**40

Ask = Callable[[Store], object]


def pull(store: Store) -> object:
    return store.pull("street")


def serve(store: Store) -> object:
    return AdaptiveModel.pull(store.uri, "street")


def copy(store: Store) -> object:
    return store.copy_to(Store(f"{store.uri}-copy"), "street")


def read_table(store: Store) -> object:
    return store.get_table(TABLE)


def _forged(store: Store, place: Folder, change: Callable[[dict[str, Any]], object], base: bytes | None = None) -> None:
    """A release whose manifest was changed, under its true digest; base: the bytes of its base."""
    content = content_of(store) | {"created": "2026-01-01T00:00:00Z"}
    if base is not None:
        content["base"] = {"digest": store.put_blob(base), "bytes": len(base)}
    change(content)
    forge(place, content)


def _files(store: Store) -> list[str]:
    digest, manifest = store.manifest("street")
    return ["refs/street/latest", f"manifests/{digest[7:]}.json", *(f"blobs/sha256/{blob.digest[7:]}" for blob in manifest.blobs)]


# each forges the store at `place`, which has a release, and says what is then asked of it


def import_path(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A network whose module would be imported, from the folder in which the reader stands."""
    (place.root / "trap.py").write_text(f"open({str(place.root / 'sprung')!r}, 'w')\n")
    name = draw.choice(["trap:network", "os:system", "builtins:eval", "trap:__import__", "../trap:x", "trap", "tests.nets:small"])
    _forged(store, place, lambda content: content["model"].update(name=name))
    return serve


def level_of_own_code(draw: random.Random, store: Store, place: Folder) -> Ask:
    name = draw.choice(["own-trap:level", "../../etc/passwd", "jpeg-10/../x", "a" * 5000, "x-1+" * 40])
    _forged(store, place, lambda content: content["levels"].update({name: content["levels"]["clean"]}))
    return serve


def classes(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A network with an output for each of a billion classes, or of a size that memory has."""
    many = draw.choice([10**9, 2**63, 10**30, 1_000_000, 200_000])
    _forged(store, place, lambda content: content["model"].update(name="drn_d_22", num_classes=many))
    return serve


def size(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A file of a tebibyte, of which the disk has nothing."""
    path = draw.choice([*_files(store), TABLE])
    os.truncate(place.root / path, draw.choice([TIB, 2**31, 70 * 2**20]))
    return read_table if path == TABLE else draw.choice([pull, copy])


def stated_size(draw: random.Random, store: Store, place: Folder) -> Ask:
    _forged(store, place, lambda content: content["base"].update(bytes=draw.choice([TIB, 2**63, 10**40, 0, -1, 1.5, "1", None])))
    return draw.choice([pull, copy])


def no_file(draw: random.Random, store: Store, place: Folder) -> Ask:
    """Something else in the place of a file."""
    path = place.root / draw.choice(_files(store))
    path.unlink()
    match draw.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.symlink_to(draw.choice(["/dev/zero", "/dev/full", "/dev/tty"]))
        case 2:
            path.symlink_to(path)
        case 3:
            path.symlink_to("/etc")
        case 4:
            os.mkfifo(path.with_name("pipe"))
            path.symlink_to("pipe")
        case 5:
            path.mkdir()
        case _:
            with chdir(path.parent), socket.socket(socket.AF_UNIX) as listening:  # the path itself may be too long for one
                listening.bind(path.name)
    return draw.choice([pull, copy])


def other_file(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A link to a file of the reader's."""
    path = place.root / draw.choice(_files(store))
    path.unlink()
    path.symlink_to(draw.choice(["/etc/passwd", "/proc/self/mem", "/proc/kcore", "/proc/self/maps", "nowhere"]))
    return draw.choice([pull, copy])


def nesting(draw: random.Random, store: Store, place: Folder) -> Ask:
    """JSON in JSON in JSON, closed or not."""
    opening, closing = draw.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'[{"a":', b"}]")])
    depth = draw.choice([400, 5000, 100_000, 4 * 2**20 // (len(opening) + len(closing)) - 20])
    nested = opening * depth + b"1" + draw.choice([b"", closing * depth])
    if draw.random() < 0.3:
        header = b'{"a":' + nested + b"}"
        _forged(store, place, lambda content: None, base=struct.pack("<Q", len(header)) + header)
    else:
        forge(place, draw.choice([nested, b'{"schema":2,"config":' + nested + b"}"])[: 4 * 2**20])
    return pull


def many_values(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A manifest, or a header, of as many values as its bytes can hold."""
    value = draw.choice([b"[]", b"{}", b"0", b'""', b'"\\u0000"', b"1e9", b"[[]]"])
    bytes_ = draw.choice([4 * 2**20, 2**20])
    many = b"[" + b",".join([value] * ((bytes_ - 100) // (len(value) + 1))) + b"]"
    if draw.random() < 0.4:
        header = draw.choice([b'{"a":%s}' % many, b'{"__metadata__":%s,"a":1}' % many, many])
        _forged(store, place, lambda content: None, base=struct.pack("<Q", len(header)) + header)
    else:
        forge(place, draw.choice([b'{"schema":2,"config":%s}' % many, b'{"schema":2,"levels":%s}' % many, many]))
    return pull


def safetensors_bomb(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A base that claims tensors of any size."""
    huge = draw.choice([2**62, 10**400, 2**31, -1, -(2**63), 1e308])
    entry = {"dtype": draw.choice(["F32", "F64", "U8", "BOOL", "F128", None, []]), "shape": [huge, huge], "data_offsets": [0, 16]}
    match draw.randrange(6):
        case 0:
            header = json.dumps({"conv.weight": entry}).encode()
        case 1:
            header = json.dumps({"conv.weight": entry | {"shape": [0, 4], "data_offsets": [0, huge]}}).encode()
        case 2:
            header = json.dumps({"conv.weight": entry | {"shape": [4], "data_offsets": [-16, 0]}}).encode()
        case 3:  # a tensor of no elements for each byte
            header = json.dumps({str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(60_000)}).encode()
        case 4:
            header = json.dumps({"a": {"dtype": "U8", "shape": [1] * 200_000, "data_offsets": [0, 1]}}).encode()
        case _:
            length = draw.choice([2**63, 2**64 - 1, TIB, 16 * 2**20 + 1, 15 * 2**20])
            _forged(store, place, lambda content: None, base=struct.pack("<Q", length) + b"{" + bytes(100))
            return pull
    _forged(store, place, lambda content: None, base=struct.pack("<Q", len(header)) + header + bytes(16))
    return pull


def parquet_bomb(draw: random.Random, store: Store, place: Folder) -> Ask:
    """A table of kilobytes that is unpacked to gigabytes."""
    place.write(TABLE, _bomb(draw.randrange(7)))
    return read_table


@functools.cache
def _bomb(number: int) -> bytes:
    file, rows = io.BytesIO(), 1_000_000
    match number:
        case 0:  # one long text, and a million references to it
            texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * 60_000]))
            pq.write_table(pa.table({"level": texts}), file, store_schema=False)
        case 1:  # more values than a table has
            pq.write_table(pa.table({"a": pa.nulls(17 * rows, pa.int64())}), file)
        case 2:  # few rows, each a list of a million
            lists = pa.ListArray.from_arrays([0, 5 * rows, 10 * rows], pa.array(np.zeros(10 * rows)))
            pq.write_table(pa.table({"a": lists}), file, compression="zstd")
        case 3:  # as many columns as rows
            pq.write_table(pa.table({str(n): [1] for n in range(3000)}), file)
        case 4 | 5:  # texts of other types, equal in all rows
            type_ = pa.binary(60_000) if number == 4 else pa.large_string()
            texts = pa.array([b"x" * 60_000 if number == 4 else "x" * 60_000] * 6000, type_)
            pq.write_table(pa.table({"a": texts}), file, compression="zstd")
        case _:  # pages of zeros
            pq.write_table(pa.table({"a": pa.array(["\0" * 2**22] * 70)}), file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def no_parquet(draw: random.Random, store: Store, place: Folder) -> Ask:
    data = bytearray(place.read(TABLE))
    for _ in range(draw.choice((1, 3, 30))):
        data[draw.randrange(len(data))] = draw.randrange(256)
    empty = b"PAR1" + bytes(10) + struct.pack("<I", draw.choice((2**31, 2**32 - 1, 5))) + b"PAR1"
    place.write(TABLE, draw.choice((empty, bytes(data))))
    return read_table


KINDS = (
    import_path, level_of_own_code, classes, size, stated_size, no_file, other_file, nesting, many_values,
    safetensors_bomb, parquet_bomb, no_parquet,
)  # fmt: skip
"""What may be forged."""


@functools.cache
def honest() -> Path:
    """A store with a release, which was read once, so that readers have imported what they import at first."""
    folder = lasting_folder("honest")
    store = Store(folder)
    store.publish(manifest_of(store), {TABLE: table()})
    for ask in (pull, serve, read_table):
        with suppress(UserError):
            ask(store)
    return folder


def hostile(draw: random.Random, folder: Path, kind: Callable[[random.Random, Store, Folder], Ask] | None = None) -> Outcome:
    """One forged store, which a reader of it refuses."""
    kind = kind or draw.choice(KINDS)
    shutil.copytree(honest(), root := folder / "store")
    store = Store(root)
    ask = kind(draw, store, Folder(root))
    modules = set(sys.modules)
    with chdir(root):
        sys.path.insert(0, "")
        held, started = peak_reset(), time.process_time()
        try:
            ask(store)
            refused = ""
        except UserError as error:
            refused = str(error)
        finally:
            seconds, memory = time.process_time() - started, peak_since(held)
            sys.path.remove("")
    what = f"{kind.__name__} ({ask.__name__})"
    wrong = []
    if not refused and kind is not no_parquet:  # a byte that nobody reads may be another
        wrong.append("was not refused")
    if "\n" in refused:
        wrong.append(f"was refused with no sentence: {refused}")
    ran = any(words in refused for words in ("building the network", "be imported", "does not fit"))  # a module that it names
    if ran or "root:" in refused or (root / "sprung").exists() or "trap" in sys.modules.keys() - modules:
        wrong.append("reached what is not the store's")
    if seconds > MOST_SECONDS or memory > MOST_BYTES:
        wrong.append(f"took {seconds:.2f} s and {memory / 2**20:.0f} MiB")
    note = f"{what} {wrong[0]}" if wrong else ""
    return Outcome(silent=len(wrong), note=note, figures={"ms": seconds * 1000, "further memory, MiB": memory / 2**20})


LINES: tuple[Line, ...] = (Line("hostile-store", "forged store", 200, hostile),)
