"""Train a small Lite-DINO, or its full-scale twin, on generated scenes.

    python examples/shapes/train.py --output runs/lite                        # about an hour on two cores
    python examples/shapes/train.py --output runs/full --variant dino-r26n    # the twin

Data, order, noise and learning rate are functions of the step and the seed alone, and a checkpoint holds everything
else: a training that is interrupted and started again with the same command ends with the same weights, bit for bit,
as one that is not.  OUTPUT holds config.json, checkpoint.pth (to resume from), log.jsonl, curves.png and
model.safetensors (averaged weights, for litedetr-export).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from trainee import Trainee

from litedetr_deploy import __version__, load_model
from litedetr_deploy.artifact import METADATA_KEY
from litedetr_deploy.assets.shapes import CLASS_NAMES, TRAIN_SEED, scene
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.model.checkpoints.official import official_key
from litedetr_deploy.model.config import parse_variant
from litedetr_deploy.model.deployed import IMAGENET_MEAN, IMAGENET_STD

# Share of the images, and their side in pixels: small scenes cost a quarter.
STAGES = ((0.35, 128), (0.15, 192), (0.5, 256))
LEARNING_RATE, WEIGHT_DECAY, WARM_UP = 4e-4, 1e-4, 0.02
LARGEST_GRADIENT = 1.0
AVERAGE_OVER = 400  # steps that the averaged weights look back over
SAVE_EVERY = 180  # seconds


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
            return side
    return STAGES[-1][1]


def collate(scenes):
    images, labels, boxes = zip(*scenes)
    return torch.stack(images), list(labels), list(boxes)


def rate_at(progress: float) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine."""
    return min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress), 1.0)


def main(
    output: Annotated[Path, typer.Option(help="Folder of everything that the training writes.")],
    variant: Annotated[str, typer.Option(help="Name of the model, with the light backbone r26n.")] = "lite-dino-r26n",
    images: Annotated[int, typer.Option(help="How many generated scenes to train on, each seen once.")] = 48_000,
    batch_size: Annotated[int, typer.Option(help="Scenes a step.")] = 8,
    precision: Annotated[
        Literal["bf16", "fp32"], typer.Option(help="Of backbone and encoder; bf16 pays where the processor has it.")
    ] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 2,
    workers: Annotated[int, typer.Option(help="Processes that draw scenes.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the first weights and of the noise of every step.")] = 0,
    start: Annotated[str | None, typer.Option(help="Weights to begin with: a file, or lite-dino-shapes.")] = None,
    side: Annotated[
        int | None, typer.Option(help="Side of the scenes in pixels; by default it grows from 128 to 256.")
    ] = None,
):
    """Train, or go on with the training in OUTPUT."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    output.mkdir(parents=True, exist_ok=True)
    config = parse_variant(variant, num_classes=len(CLASS_NAMES))
    wanted = {
        "variant": variant, "images": images, "batch_size": batch_size, "seed": seed, "side": side, "stages": STAGES,
        "precision": precision, "learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "warm_up": WARM_UP,
        "average_over": AVERAGE_OVER,
    }  # fmt: skip
    trainee = Trainee(config)
    if start:
        trainee.detector.load_state_dict(load_model(start, variant).state_dict())
        wanted["start"] = Path(start).name
    wanted = json.loads(json.dumps(wanted))
    trainee.to(device).train()
    average = torch.optim.swa_utils.AveragedModel(
        trainee, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(1 - 1 / AVERAGE_OVER), use_buffers=True
    )
    optimizer = torch.optim.AdamW(trainee.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    step, rows = resume(output / "checkpoint.pth", wanted, trainee, average, optimizer)
    with replaced_when_done(output / "config.json") as temporary:
        used = {"device": device, "threads": threads, "torch": torch.__version__, "tool_version": __version__}
        temporary.write_text(json.dumps(wanted | used, indent=2) + "\n")
    total = images // batch_size
    loader = DataLoader(
        Scenes(step * batch_size, total * batch_size, batch_size, side),
        batch_size,
        num_workers=workers,
        collate_fn=collate,
    )
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    saved, since = time.monotonic(), time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)

    def save():
        state = {"trainee": trainee.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
        with replaced_when_done(output / "checkpoint.pth") as temporary:
            torch.save(state | {"step": step, "rows": rows, "wanted": wanted}, temporary)
        with replaced_when_done(output / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        write_weights(average.module, wanted, output / "model.safetensors")

    with Progress(*columns) as progress:
        task = progress.add_task("training", total=total, completed=step)
        try:
            for pixels, labels, boxes in loader:
                torch.manual_seed(seed_of(seed, step))
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * rate_at((step + 1) / total)
                pixels = (pixels.to(device).float() / 255 - mean) / std
                labels, boxes = ([x.to(device) for x in xs] for xs in (labels, boxes))
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    loss = trainee.loss(pixels.contiguous(memory_format=torch.channels_last), labels, boxes)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainee.parameters(), LARGEST_GRADIENT)
                optimizer.step()
                average.update_parameters(trainee)
                step += 1
                rows.append({"step": step, "loss": loss.item(), "seconds": round(time.monotonic() - since, 2)})
                recent = sum(row["loss"] for row in rows[-50:]) / len(rows[-50:])
                progress.update(task, completed=step, description=f"loss {recent:.2f}")
                if time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()
        finally:
            save()
    draw_curves(rows, output / "curves.png")
    print(f"{output / 'model.safetensors'}: {step} steps of {batch_size} scenes")


def seed_of(seed: int, step: int) -> int:
    """The seed of everything that is random in a step."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def resume(path: Path, wanted: dict, trainee, average, optimizer) -> tuple[int, list[dict]]:
    """Load the checkpoint where there is one; return the step to go on with and the log so far."""
    if not path.is_file():
        return 0, []
    state = torch.load(path, weights_only=True)
    if state["wanted"] != wanted:
        raise SystemExit(f"{path} is of a training with {state['wanted']}, not {wanted}: choose another --output.")
    trainee.load_state_dict(state["trainee"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["rows"]


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


def draw_curves(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    smooth = np.convolve([row["loss"] for row in rows], np.ones(min(50, len(rows))) / min(50, len(rows)), "valid")
    axes.plot([row["step"] for row in rows][len(rows) - len(smooth) :], smooth)
    axes.set(xlabel="step", ylabel="loss, all layers", yscale="log")
    with replaced_when_done(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


if __name__ == "__main__":
    typer.run(main)
