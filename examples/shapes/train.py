"""Trains a small Lite-DINO, or its full-scale twin, on generated scenes.

    python examples/shapes/train.py --output runs/lite                        # a few hours on two cores
    python examples/shapes/train.py --output runs/full --variant dino-r26n    # the twin
    python examples/shapes/train.py --output runs/more --start runs/lite/model.safetensors --side 256 --images 22400

Interrupt it as you like: the same command goes on where the last checkpoint was written.  OUTPUT then holds
checkpoint.pth (to go on), log.jsonl, curves.png and model.safetensors (averaged weights, for litedetr-export).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from trainee import Trainee

from litedetr_deploy import __version__
from litedetr_deploy.evaluate.shapes import CLASS_NAMES, TRAIN_SEED, scene
from litedetr_deploy.export.deployed import IMAGENET_MEAN, IMAGENET_STD
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.model.checkpoint import METADATA_KEY, load_model, official_key
from litedetr_deploy.model.config import parse_variant

# Share of the images, and their side in pixels: most is learnt on small scenes, which cost a quarter.
STAGES = ((0.6, 128), (0.2, 192), (0.2, 256))
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 4e-4, 1e-4, 0.02
LARGEST_GRADIENT = 1.0
AVERAGE_OVER = 400  # steps that the averaged weights look back over


class Scenes(Dataset):
    """Scene `index` of the training seed: image [3, S, S] uint8, labels [K], boxes [K, 4] cxcywh in 0..1."""

    def __init__(self, first: int, total: int, batch_size: int, side: int | None):
        self.first, self.total, self.batch_size, self.side = first, total, batch_size, side

    def __len__(self):
        return self.total - self.first

    def __getitem__(self, position):
        index = self.first + position
        side = self.side or side_at((index - index % self.batch_size) / self.total)  # one side a batch
        image, boxes, labels = scene(index, TRAIN_SEED, (side, side))
        boxes = torch.from_numpy(boxes) / side
        boxes = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1), torch.from_numpy(labels), boxes


def side_at(progress: float) -> int:
    """The scenes' side after this share of the training."""
    for share, side in STAGES:
        progress -= share
        if progress < -1e-9:
            break
    return side


def collate(scenes):
    images, labels, boxes = zip(*scenes)
    return torch.stack(images), list(labels), list(boxes)


def rate_at(progress: float) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine."""
    return min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress), 1.0)


def main(
    output: Annotated[Path, typer.Option(help="Folder of everything that the training writes.")],
    variant: Annotated[str, typer.Option(help="Name of the model, with the light backbone r26n.")] = "lite-dino-r26n",
    images: Annotated[int, typer.Option(help="How many generated scenes to train on, each seen once.")] = 44_800,
    batch_size: Annotated[int, typer.Option(help="Scenes a step.")] = 8,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first weights and the noise.")] = 0,
    start: Annotated[str | None, typer.Option(help="Weights to begin with: a file, or lite-dino-shapes.")] = None,
    side: Annotated[int | None, typer.Option(help="Side of the scenes in pixels; by default it grows from 128 to 256.")] = None,
):
    """Train, or go on with the training in OUTPUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    config = parse_variant(variant, num_classes=len(CLASS_NAMES))
    wanted = {"variant": variant, "images": images, "batch_size": batch_size, "seed": seed, "side": side}
    trainee = Trainee(config)
    if start:
        trainee.detector.load_state_dict(load_model(start, variant).state_dict())
        wanted["start"] = Path(start).name
    trainee.to(device).train()
    average = torch.optim.swa_utils.AveragedModel(
        trainee, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / AVERAGE_OVER), use_buffers=True
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    step = resume(output / "checkpoint.pth", wanted, trainee, average, optimizer)
    total = images // batch_size
    loader = DataLoader(
        Scenes(step * batch_size, total * batch_size, batch_size, side),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    saved, losses, started = time.monotonic(), [], time.monotonic()

    def save():
        with replaced_when_done(output / "checkpoint.pth") as temporary:
            state = {"trainee": trainee.state_dict(), "average": average.state_dict()}
            torch.save(state | {"optimizer": optimizer.state_dict(), "step": step, "wanted": wanted}, temporary)
        write_weights(average.module, wanted, output / "model.safetensors")

    with Progress(*columns) as progress, (output / "log.jsonl").open("a") as log:
        task = progress.add_task("training", total=total, completed=step)
        try:
            for pixels, labels, boxes in loader:
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * rate_at((step + 1) / total)
                pixels = (pixels.to(device).float() / 255 - mean) / std
                labels, boxes = ([x.to(device) for x in xs] for xs in (labels, boxes))
                with torch.autocast(device, torch.bfloat16):
                    loss = trainee.loss(pixels.contiguous(memory_format=torch.channels_last), labels, boxes)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainee.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                average.update_parameters(trainee)
                step += 1
                losses.append(loss.item())
                progress.update(task, completed=step, description=f"loss {np.mean(losses[-50:]):.2f}")
                if step % 50 == 0 or step == total:
                    row = {"step": step, "loss": float(np.mean(losses[-50:])), "seconds": time.monotonic() - started}
                    print(json.dumps(row), file=log, flush=True)
                if time.monotonic() - saved > 300:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    draw_curves(output / "log.jsonl", output / "curves.png")
    print(f"{output / 'model.safetensors'}: {step} steps of {batch_size} scenes")


def resume(path: Path, wanted: dict, trainee, average, optimizer) -> int:
    """Loads the checkpoint where there is one; the step to go on with."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    if state["wanted"] != wanted:
        raise SystemExit(f"{path} is of a training with {state['wanted']}, not {wanted}: choose another --output.")
    trainee.load_state_dict(state["trainee"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def write_weights(trainee: Trainee, wanted: dict, path: Path) -> None:
    """The detector's weights under the official names, as float16."""
    detector = trainee.detector
    tensors = {
        official_key(key): value.detach().cpu().half().contiguous() if value.is_floating_point() else value
        for key, value in detector.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    arguments = {
        **{k: v for k, v in dataclasses.asdict(detector.config).items() if k in ("enc_scale", "num_expansion")},
        "class_names": CLASS_NAMES,
        "training": wanted,
        "tool_version": __version__,
    }
    with replaced_when_done(path) as temporary:
        save_file(tensors, temporary, {METADATA_KEY: json.dumps(arguments)})


def draw_curves(log: Path, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in log.read_text().splitlines()]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["step"] for row in rows], [row["loss"] for row in rows])
    axes.set(xlabel="step", ylabel="loss, all layers", yscale="log")
    with replaced_when_done(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    typer.run(main)
