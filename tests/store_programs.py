"""A program that works on a store as it is told, a line of JSON for each round. Imports torch only to pull."""

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gearnn_ray.core.errors import UserError
from gearnn_ray.store.blobs import digest_of
from gearnn_ray.store.manifest import Manifest
from gearnn_ray.store.releases import Store


def publish(store: Store, template: Store, digest: str) -> str:
    """Publish a release of another store: put its blobs as a job would, then the release."""
    _, manifest = template.manifest(f"street@{digest}")
    for blob in (*manifest.needed, *manifest.blobs):
        assert store.put_blob(template.get_blob(blob.digest)) == blob.digest
    tables = {path: template.get_blob(blob.digest) for path, blob in manifest.files.items()}
    assert all(digest_of(data) == manifest.files[path].digest for path, data in tables.items())
    return store.publish(Manifest.model_validate(manifest.as_json()), {})


def work(round_: dict[str, Any]) -> object:
    store = Store(round_["store"])
    time.sleep(round_["delay"])
    if round_["what"] == "publish":
        return publish(store, Store(round_["template"]), round_["digest"])
    if round_["what"] == "rollback":
        store.tag("street", "latest", round_["digest"])
        return round_["digest"]
    if round_["what"] == "pull":
        return [store.pull("street").digest for _ in range(round_["times"])]
    return store.gc(3600, dry_run=False)


class Programs:
    """Such programs, which work at the same time."""

    def __init__(self, count: int) -> None:
        command = [sys.executable, "-m", "tests.store_programs"]
        root = Path(__file__).parent.parent
        self._started = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root) for _ in range(count)
        ]

    def round(self, tasks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Give each program its task; what it has "done", or the sentence with which it was "refused"."""
        for program, task in zip(self._started, tasks, strict=True):
            assert program.stdin
            program.stdin.write(json.dumps(task) + "\n")
            program.stdin.flush()
        return [json.loads(program.stdout.readline()) for program in self._started if program.stdout]

    def end(self) -> None:
        for program in self._started:
            program.communicate(timeout=20)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for line in sys.stdin:
        try:
            answer: Any = {"done": work(json.loads(line))}
        except UserError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)
