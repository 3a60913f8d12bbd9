"""What machines on AWS may do (deploy/aws/), as IAM reads it: whoever trains publishes nothing, and nobody can lose a version."""

import json
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from gearnn_ray.store.blobs import BlobStore
from gearnn_ray.store.releases import Store
from tests import served
from tests.conftest import ROOT
from tests.test_signatures import write_keys

AWS = ROOT / "deploy/aws"
Statement = dict[str, Any]


def policy(name: str) -> list[Statement]:
    found = json.loads((AWS / f"{name}.json").read_text())
    assert found["Version"] == "2012-10-17"
    return list(found["Statement"])


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(name: str, action: str, path: str) -> bool:
    """Whether the policy allows an action on the object at this path of the store."""
    resource = f"arn:aws:s3:::BUCKET/PREFIX/{path}"
    return any(
        any(fnmatchcase(action, each) for each in listed(statement["Action"]))
        and any(fnmatchcase(resource, each) for each in listed(statement["Resource"]))
        for statement in policy(name)
    )


def paths_of(folder: Path) -> set[str]:
    """Without the lock, which only a local folder has."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name[0] != "."}


def actions(name: str) -> Iterator[str]:
    for statement in policy(name):
        assert statement["Effect"] == "Allow"
        yield from listed(statement["Action"])


def test_a_worker_writes_what_training_makes_and_publishes_nothing(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    store.put_blob(b"a network")
    store.put_record("a" * 64, {"score": 1})
    store.put_checkpoint("b" * 64, b"an epoch")
    made = paths_of(tmp_path)
    assert {path.partition("/")[0] for path in made} == {"blobs", "stages", "checkpoints"}
    for path in made:
        assert allows("store-worker", "s3:PutObject", path), path
        assert allows("store-worker", "s3:DeleteObject", path) == path.startswith("checkpoints/")
        assert allows("store-worker", "s3:GetObject", path)


def test_only_the_head_writes_what_makes_a_release(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    served.publish(store)
    store.sign("tiny", write_keys(tmp_path)[0])
    made = {path for path in paths_of(tmp_path / "store") if not path.startswith(("blobs/", "stages/"))}
    assert {path.partition("/")[0] for path in made} >= {"manifests", "refs", "signatures"}
    for path in (*made, "tables/tiny/summary.parquet", "figures/tiny/accuracy.png", "reports/tiny.html"):
        for action in ("s3:PutObject", "s3:DeleteObject"):
            assert not allows("store-worker", action, path), path
            assert allows("store-head", action, path), path


@pytest.mark.parametrize("name", ["store-head", "store-worker"])
def test_nobody_deletes_a_version_or_changes_the_bucket(name: str) -> None:
    expected = {
        "s3:ListBucket",
        "s3:GetBucketLocation",
        "s3:GetObject",
        "s3:PutObject",
        "s3:DeleteObject",
        "s3:AbortMultipartUpload",
    }
    assert {*actions(name)} == expected
    for statement in policy(name):
        assert all(each.startswith("arn:aws:s3:::BUCKET") for each in listed(statement["Resource"]))


def test_the_head_launches_workers_as_cluster_yaml_describes_them_and_nothing_else() -> None:
    assert not [action for action in actions("launch") if "*" in action]
    cluster = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    nodes = cluster["available_node_types"]
    worker = next(node["node_config"] for name, node in nodes.items() if name != cluster["head_node_type"])
    by_name = {statement["Sid"]: statement for statement in policy("launch")}
    launched = by_name["LaunchWorkersWithImdsV2"]["Condition"]["StringEquals"]
    assert launched == {
        "ec2:InstanceType": worker["InstanceType"], "ec2:MetadataHttpTokens": worker["MetadataOptions"]["HttpTokens"],
        "aws:RequestTag/ray-cluster-name": cluster["cluster_name"],
    }  # fmt: skip
    own = by_name["ManageOwnMachines"]["Condition"]["StringEquals"]
    assert own == {"ec2:ResourceTag/ray-cluster-name": cluster["cluster_name"]}
    assert by_name["GiveWorkersTheirRole"]["Resource"].endswith(f":role/{worker['IamInstanceProfile']['Name']}")
    everywhere = [statement["Sid"] for statement in policy("launch") if "*" in listed(statement["Resource"])]
    assert everywhere == ["Look"]  # EC2 knows no narrower right to look
    regions = set(re.findall(r"arn:aws:(?:ec2|ssm):([a-z0-9-]+)", (AWS / "launch.json").read_text()))
    assert regions == {cluster["provider"]["region"]}


def test_old_versions_and_unfinished_uploads_end_by_themselves() -> None:
    rules = json.loads((AWS / "lifecycle.json").read_text())["Rules"]
    assert all(rule["Status"] == "Enabled" for rule in rules)
    assert sum(rule.get("NoncurrentVersionExpiration", {}).get("NoncurrentDays", 0) for rule in rules) >= 7
    assert sum(rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation", 0) for rule in rules) > 0


def test_docs_name_every_file() -> None:
    text = (ROOT / "docs/cluster.md").read_text()
    for path in sorted(AWS.iterdir()):
        assert f"deploy/aws/{path.name}" in text or path.stem in text, path
    assert "EC2FullAccess" not in (ROOT / "cluster.yaml").read_text()
