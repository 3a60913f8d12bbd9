#!/usr/bin/env python3
"""Does the service score what the release says? CamVid val as real JPEG files over HTTP, the level read off each file.

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

from gearnn_ray import Store, build_model
from gearnn_ray.data.dataset import open_dataset
from gearnn_ray.levels.level import parse_level
from gearnn_ray.tasks.segmentation import IGNORED, Normalisation, confusion, logits_of, mean_iou

CLIENTS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--camvid", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--release", required=True)
    parser.add_argument("--alone", nargs="*", default=[], metavar="LEVEL")
    arguments = parser.parse_args()
    release = Store(arguments.store).pull(arguments.release)
    manifest = release.manifest
    levels = sorted(
        (q for q in manifest["levels"] if q.startswith("jpeg-")), key=lambda q: int(q.removeprefix("jpeg-"))
    )
    levels = [level for level in levels if level in arguments.alone or not arguments.alone]
    val = open_dataset("camvid", arguments.camvid).val
    classes = manifest["model"]["num_classes"]

    def answer(port: int, index: int, quality: int) -> tuple[torch.Tensor, str]:
        """hist_KK of one frame, and the level that the service used."""
        file = io.BytesIO()
        Image.fromarray(val.image(index)).save(file, "JPEG", quality=quality)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/predict", file.getvalue(), {"content-type": "image/jpeg"})
        response = connection.getresponse()
        body = response.read()
        assert response.status == 200, body
        predicted = np.asarray(Image.open(io.BytesIO(body))).astype(np.int64)
        label = val.label(index).astype(np.int64)
        cells = (label * classes + predicted)[label != IGNORED]
        hist = torch.from_numpy(np.bincount(cells, minlength=classes**2)).view(classes, classes)
        return hist, str(response.headers["x-gearnn-level"])

    def alone(level: str) -> float:
        """mIoU of the level's own network on the same files, float32, no service."""
        network = build_model(manifest["model"]["name"], classes).eval()
        network.load_state_dict({**release.base_state(), **release.adaptor_state(level)}, strict=False)
        normalise = Normalisation(*(tuple(manifest["model"]["normalisation"][k]) for k in ("mean", "std")))
        hist = torch.zeros(classes, classes, dtype=torch.int64)
        for index in range(len(val)):
            (image,) = parse_level(level).apply([val.image(index)])
            x = normalise(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
            with torch.no_grad():
                hist += confusion(logits_of(network, x), val.label(index))
        return mean_iou(hist)

    options = ("--store", arguments.store, "--bundles", arguments.release, "--num-cpus", "2")
    print(f"{'level':10}{'release':>9}{'service':>9}{'difference':>12}  levels used")
    with service(*options) as port, ThreadPoolExecutor(CLIENTS) as clients:
        for level in levels:
            quality = int(level.removeprefix("jpeg-"))
            found = list(clients.map(lambda index, q=quality: answer(port, index, q), range(len(val))))
            hist = torch.stack([hist for hist, _ in found]).sum(0)
            used = {name: sum(name == level for _, level in found) for name in {level for _, level in found}}
            said, scored = manifest["levels"][level]["scores"]["adaptor"], mean_iou(hist)
            print(f"{level:10}{said:9.2f}{scored:9.2f}{scored - said:12.2f}  {used}", flush=True)
    for level in arguments.alone:
        print(f"{level}: the level's own network in float32, without a service, {alone(level):.2f}", flush=True)


if __name__ == "__main__":
    main()
