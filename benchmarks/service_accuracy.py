#!/usr/bin/env python3
"""Accuracy of the service beside the scores in a release: CamVid val as JPEG files over HTTP, the level estimated from each file.

uv run benchmarks/service_accuracy.py --camvid CAMVID --store STORE --release drn22-camvid:latest
"""

import argparse
import http.client
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from serving import service
from torch import Tensor

from gearnn_ray import Store
from gearnn_ray.data.dataset import IGNORED, open_dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.models.registry import build_released_model
from gearnn_ray.tasks import task_by_name
from gearnn_ray.tasks.base import score
from gearnn_ray.training.predict import Normalisation, Predictor, collect_evidence

CLIENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--release", required=True)
    parser.add_argument("--alone", nargs="*", default=[], metavar="LEVEL", help="evaluate only these, also without a service")
    arguments = parser.parse_args()
    release = Store(arguments.store).pull(arguments.release)
    model, entries = release.content.model, release.content.levels
    task = task_by_name(model.task)
    levels = sorted((q for q in entries if q.startswith("jpeg-")), key=lambda q: int(q.removeprefix("jpeg-")))
    levels = [level for level in levels if level in arguments.alone or not arguments.alone]
    val = open_dataset("camvid", arguments.camvid).val
    classes = model.num_classes

    def answer(port: int, index: int, quality: int) -> tuple[dict[str, Tensor], str]:
        """The task's evidence of one frame, and the level that the service used."""
        file = io.BytesIO()
        Image.fromarray(val.image(index)).save(file, "JPEG", quality=quality)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/predict", file.getvalue(), {"content-type": "image/jpeg"})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        predicted = np.asarray(Image.open(io.BytesIO(body))).astype(np.int64)
        label = val.target(index).astype(np.int64)
        cells = (label * classes + predicted)[label != IGNORED]
        counts = torch.from_numpy(np.bincount(cells, minlength=classes**2)).view(classes, classes)
        return {"counts": counts}, str(response.headers["x-gearnn-level"])

    def alone(level: str) -> float:
        """Score of the level's own network on the same files, in float32 and without a service."""
        network = build_released_model(model.name, classes)
        network.load_state_dict({**release.base_state(), **release.adaptor_state(level)}, strict=False)
        predictor = Predictor(network, Normalisation(model.normalisation.mean, model.normalisation.std), "float32")
        images = [parse_level(level).apply([val.image(index)])[0] for index in range(len(val))]
        labels = [val.target(index) for index in range(len(val))]
        return score(task, collect_evidence(task, network, [predictor], images, labels, classes)[0])

    options = ("--store", arguments.store, "--bundles", arguments.release, "--num-cpus", "2")
    print(f"{'level':10}{'release':>9}{'service':>9}{'difference':>12}  levels used")
    with service(*options) as port, ThreadPoolExecutor(CLIENTS) as clients:
        for level in levels:
            quality = int(level.removeprefix("jpeg-"))
            found = list(clients.map(lambda index, q=quality: answer(port, index, q), range(len(val))))
            counts = torch.stack([evidence["counts"] for evidence, _ in found])
            used = {name: sum(name == level for _, level in found) for name in {level for _, level in found}}
            released, served = entries[level].scores.adaptor, score(task, {"counts": counts})
            assert released is not None
            print(f"{level:10}{released:9.2f}{served:9.2f}{served - released:12.2f}  {used}", flush=True)
    for level in arguments.alone:
        print(f"{level}: the level's own network in float32, without a service, {alone(level):.2f}", flush=True)


if __name__ == "__main__":
    main()
