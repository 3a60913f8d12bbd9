"""A program that works on a store as it is told, a line of JSON for each round. Imports no torch, so that it starts soon."""

import json
import sys
import time
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
    return store.gc(3600, dry_run=False)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    for line in sys.stdin:
        try:
            answer: Any = {"done": work(json.loads(line))}
        except UserError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)
