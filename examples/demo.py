"""The whole way through on this machine: a checkpoint in, a verified ONNX model and a picture out.

The weights are random, because no trained ones can be shipped here yet: what is found in the picture means nothing,
that ONNX Runtime and PyTorch find the same does.
"""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

import litedetr_deploy as ld
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.model.checkpoint import official_key
from litedetr_deploy.runtime.draw import draw, save
from litedetr_deploy.runtime.sample import sample_images

VARIANT = "lite-dino-r50-h3l1-2+1x3"
SIZE = (640, 640)
FOLDER = Path("demo")


def main():
    FOLDER.mkdir(exist_ok=True)
    # Its name says s3ex3 as the official files do: three high-level scales, three expansions.
    checkpoint, model = FOLDER / "r50_s3ex3_untrained.pth", FOLDER / "lite-dino-r50.onnx"
    make_checkpoint(checkpoint)
    size = "x".join(map(str, SIZE))
    run("litedetr-export", checkpoint, "-o", model, "--image-size", size)
    picture = sample_images(1)[0]
    detector = ld.Detector(model)
    (found,) = detector.predict(picture)
    (best,) = detector.predict(picture, threshold=found.scores[7])
    save(draw(picture, best), FOLDER / "detections.jpg")
    compare_speed(detector, ld.load_model(checkpoint), picture)
    print(f"\nThe model: {model}\nThe picture (untrained weights, so the boxes mean nothing): {FOLDER / 'detections.jpg'}")


def make_checkpoint(path):
    """A checkpoint in the official format, with weights from a fixed seed."""
    torch.manual_seed(0)
    model = ld.load_model(variant=VARIANT)
    with replaced_when_done(path) as temporary:
        torch.save({"model": {official_key(k): v for k, v in model.state_dict().items()}}, temporary)


def run(command, *arguments):
    """A command of this package, as a user types it."""
    print("$", command, *arguments, flush=True)
    status = subprocess.run([Path(sys.executable).parent / command, *map(str, arguments)]).returncode
    if status:
        sys.exit(status)


def compare_speed(detector, model, picture):
    """Medians of a few interleaved runs on one image; both use all cores."""
    image = torch.rand(1, 3, *SIZE)

    def in_pytorch():
        with torch.inference_mode():
            model(image)

    contenders = {"ONNX Runtime": lambda: detector.predict(picture), "PyTorch": in_pytorch}
    times = {name: [] for name in contenders}
    for _ in range(4):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    print()
    for name, seconds in times.items():
        print(f"{name:14} {np.median(seconds[1:]):6.2f} s an image of {SIZE[0]}x{SIZE[1]}, both with our attention op")


if __name__ == "__main__":
    main()
