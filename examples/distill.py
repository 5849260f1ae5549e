"""Make a full-scale detector light: train a Lite student to compute what its full-scale teacher does, without labels.

    python examples/distill.py dino.pth --variant lite-dino-r50-h3l1-2+1x3 --images coco/train2017 --output runs/lite
    torchrun --nproc-per-node 8 examples/distill.py dino.pth --variant ... --images ... --output ... --device cuda

The student starts with the teacher's weights.  What it has beyond them is new: the light feed-forward networks, which
start as the identity, and, with key-aware attention, the query projections, which start at zero.  Backbone and input
projections stay the teacher's and run once for both.  The student learns the teacher's encoder output, the scores by
which tokens become queries, and, for the teacher's choice of queries, its logits and boxes.

Batches, their order and the learning rate are functions of the step and the seed alone, and a checkpoint holds
everything else: interrupted and started again with the same command, the training ends with the same weights.  OUTPUT
holds config.json, checkpoint.pth (to resume from), log.jsonl, and the student after every quarter of the training:
student-25.safetensors to student-100.safetensors, checkpoints for `litedetr export`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as distributed
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

import litedetr_deploy as ld
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.model.config import DetectorConfig, parse_variant
from litedetr_deploy.model.deployed import IMAGENET_MEAN, IMAGENET_STD
from litedetr_deploy.model.detector import Detector
from litedetr_deploy.runtime.images import find_images, load_image, shortest_edge_size

WEIGHT_DECAY, WARM_UP, LARGEST_GRADIENT = 1e-4, 0.02, 1.0
SMALLEST_SHARE = 0.6  # of the shortest edge, from which that of every batch is drawn
QUARTERS = 4
SAVE_EVERY = 180  # seconds
# Of the encoder's output, the token scores, the logits, and the boxes by L1 and GIoU (DETR, arXiv 2005.12872).
LOSS_WEIGHTS = {"memory": 2.0, "scores": 1.0, "logits": 1.0, "l1": 5.0, "giou": 2.0}


def student_config(teacher: DetectorConfig, variant: str, key_aware: bool | None = None) -> DetectorConfig:
    """Return the configuration of `variant` in the teacher's sizes.

    Raises LiteDetrError where family or backbone differ: their weights would have nothing in common.
    """
    wanted = parse_variant(variant)
    for name in ("family", "backbone"):
        if getattr(wanted, name) != getattr(teacher, name):
            raise LiteDetrError(
                f"the variant {variant!r} has the {name} {getattr(wanted, name)}, and the teacher has "
                f"{getattr(teacher, name)}. Give a variant of the teacher's {name}."
            )
    fields = {name: getattr(wanted, name) for name in ("enc_scale", "num_expansion", "small_expand")}
    return dataclasses.replace(teacher, **fields, key_aware=wanted.key_aware if key_aware is None else key_aware)


def make_student(teacher: Detector, config: DetectorConfig) -> Detector:
    """Return a detector of `config` with the weights of `teacher`, as far as both have them."""
    student = Detector(config)
    own, given = student.state_dict(), teacher.state_dict()
    for name, value in own.items():
        if name in given and given[name].shape == value.shape:
            value.copy_(given[name])
        elif ".query_proj." in name or ".linear22." in name:
            value.zero_()  # attention to all samples alike; the identity
        elif ".norm22." in name:
            value.copy_(given[name.replace("norm22", "norm2")])
    student.load_state_dict(own)
    student.class_names = teacher.class_names
    return student.eval()


class Distillation(nn.Module):
    """A student with its teacher, which share backbone and input projections; its forward pass is the loss."""

    def __init__(self, teacher: Detector, student: Detector, half: torch.dtype | None = None):
        super().__init__()
        self.teacher, self.student, self.half = teacher.requires_grad_(False).eval(), student.requires_grad_(True), half
        for part in (student.backbone, student.input_proj):
            part.requires_grad_(False)

    def forward(self, images: Tensor, pixel_mask: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, a scalar, and its unweighted parts.

        images [N, 3, H, W], normalised; pixel_mask [N, H, W], True = padding, None without padding.
        """
        with torch.no_grad(), self._cast(images):
            maps = self.teacher.project(images)
            encoded = self.teacher.encode(images, pixel_mask, maps)
        with torch.no_grad():
            wanted = self.teacher.decode(_float(encoded))
        with self._cast(images):
            encoded = self.student.encode(images, pixel_mask, maps)
        found = self.student.decode(_float(encoded), wanted["topk_indices"])
        parts = losses(found, wanted, encoded.padding_mask)
        return sum(LOSS_WEIGHTS[name] * part for name, part in parts.items()), parts

    def _cast(self, images: Tensor):
        return torch.autocast(images.device.type, self.half, enabled=self.half is not None)


def _float(encoded):
    """The same in float32: boxes need more than the 8 bits of bfloat16."""
    return type(encoded)(*(x.float() if x is not None and x.is_floating_point() else x for x in encoded))


def losses(found: dict[str, Tensor], wanted: dict[str, Tensor], padding_mask: Tensor | None) -> dict[str, Tensor]:
    """Return what the student is trained to make small, 0 each where it computes what the teacher does.

    found, wanted: as `Detector` returns them, for the same queries; padding_mask [N, S], True = padding.

    The encoder's output by its squared difference, as a part of the teacher's variance.  Scores and logits by the
    quality focal loss (arXiv 2006.04388) with the teacher's probabilities as its soft labels.  Boxes count by the
    best score that the teacher gives them.
    """
    valid = torch.ones_like(found["memory"][..., 0]) if padding_mask is None else (~padding_mask).float()
    memory, target = found["memory"].float(), wanted["memory"].float()
    variance = (target - target.mean(-1, keepdim=True)).square().mean(-1)
    apart = (memory - target).square().mean(-1)
    confidence = wanted["pred_logits"].sigmoid().amax(-1)  # N, Q
    objects = confidence.sum().clamp(min=1)
    boxes, targets = found["pred_boxes"], wanted["pred_boxes"]
    return {
        "memory": (apart * valid).sum() / (variance * valid).sum(),
        "scores": (_quality_focal(found["proposal_scores"], wanted["proposal_scores"]) * valid).sum() / objects,
        "logits": _quality_focal(found["pred_logits"], wanted["pred_logits"]).sum() / objects,
        "l1": ((boxes - targets).abs().sum(-1) * confidence).sum() / objects,
        "giou": ((1 - generalized_iou(boxes, targets)) * confidence).sum() / objects,
    }


def _quality_focal(logits: Tensor, target_logits: Tensor) -> Tensor:
    target = target_logits.float().sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    return (logits.float().sigmoid() - target).square() * entropy


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """GIoU (arXiv 1902.09630) of boxes [..., 4] cxcywh, pair by pair -> [...]."""
    (a_low, a_high), (b_low, b_high) = ((x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2) for x in (a, b))
    inner = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    outer = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    smallest = torch.finfo(a.dtype).tiny
    return inner / union.clamp(min=smallest) - (outer - union) / outer.clamp(min=smallest)


class Images(Dataset):
    """Image number `position` of the training, a function of the position and the seed alone: its file, whether it is
    mirrored, and its size, which the images of a batch share.

    Every epoch has all files once, in an order of its own.
    """

    def __init__(self, files: list[Path], positions: list[int], per_step: int, shortest: int, longest: int, seed: int):
        self.files, self.positions, self.per_step = files, positions, per_step
        self.shortest, self.longest, self.seed = shortest, longest, seed

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Tensor:
        position = self.positions[index]
        epoch, place = divmod(position, len(self.files))
        order = _order(len(self.files), self.seed, epoch)
        step = np.random.default_rng([self.seed, 1, position // self.per_step])
        shortest = round(self.shortest * step.uniform(SMALLEST_SHARE, 1))
        image = load_image(self.files[order[place]])
        if np.random.default_rng([self.seed, 2, position]).random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        image = image.resize(shortest_edge_size(*image.size, shortest, self.longest), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@functools.lru_cache(maxsize=2)  # a batch can reach into the next epoch
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def collate(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return images [N, 3, H, W], normalised, zero where padded; and the mask of the padding, None for none."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    batch = torch.zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        batch[i, :, : image.shape[1], : image.shape[2]] = (image / 255 - mean) / std
        mask[i, : image.shape[1], : image.shape[2]] = False
    return batch, mask if mask.any() else None


def rate_at(progress: float) -> float:
    """Return the share of the learning rate: a linear warm-up, then half a cosine."""
    return min(progress / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * progress), 1.0)


class Group:
    """The processes of this training: this one alone, or those that torchrun started."""

    def __init__(self, device: str):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = (
            torch.device(device, int(os.environ["LOCAL_RANK"]))
            if device == "cuda" and self.size > 1
            else (torch.device(device))
        )
        if self.size > 1:
            if device == "cuda":
                torch.cuda.set_device(self.device)
            distributed.init_process_group("nccl" if device == "cuda" else "gloo")

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def wrapped(self, module: nn.Module) -> nn.Module:
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(module, device_ids=ids)

    def close(self) -> None:
        if self.size > 1:
            distributed.destroy_process_group()


def main(
    teacher: Annotated[str, typer.Argument(help="The trained full-scale detector, a checkpoint.")],
    variant: Annotated[str, typer.Option(help="What the student is, as in lite-dino-r50-h3l1-2+1x3.")],
    images: Annotated[Path, typer.Option(help="Folder of images like those that the detector will see.")],
    output: Annotated[Path, typer.Option(help="Folder of everything that the training writes.")],
    teacher_variant: Annotated[
        str | None, typer.Option(help="What the teacher is, if its checkpoint cannot tell.")
    ] = None,
    attention: Annotated[
        Literal["key-aware", "plain"] | None,
        typer.Option(help="The student's attention; key-aware for Lite variants if not given."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 20_000,
    batch_size: Annotated[int, typer.Option(min=1, help="Images a step, on all devices together.")] = 16,
    shortest: Annotated[int, typer.Option(min=64, help="Largest length of an image's shorter side, pixels.")] = 800,
    longest: Annotated[int, typer.Option(min=64, help="Largest length of its longer side, pixels.")] = 1333,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of AdamW, at its highest.")] = 2e-4,
    precision: Annotated[
        Literal["fp32", "fp16", "bf16"], typer.Option(help="Of backbone and encoder; losses and decoder are in FP32.")
    ] = "bf16",
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where to train.")] = "cpu",
    workers: Annotated[int, typer.Option(min=0, help="Processes that load images, on each device.")] = 2,
    seed: Annotated[int, typer.Option(min=0, help="Of the images' order, and of new weights.")] = 0,
):
    """Distil TEACHER into a Lite student, or go on with the training in OUTPUT."""
    try:
        options = {k: v for k, v in locals().items() if k not in ("output", "device", "workers")}
        distil(**options, output=output, device=device, workers=workers)
    except LiteDetrError as error:
        print(f"error: {error}")
        raise typer.Exit(error.exit_status) from None


def distil(
    teacher, variant, images, output, teacher_variant, attention, steps, batch_size, shortest, longest, learning_rate,
    precision, device, workers, seed,
) -> None:  # fmt: skip
    group = Group(device)
    if batch_size % group.size:
        raise LiteDetrError(
            f"--batch-size is {batch_size}, and there are {group.size} processes; it must be a multiple of that."
        )
    files = find_images(images)
    torch.manual_seed(seed)
    model = ld.load_model(teacher, teacher_variant)
    student = make_student(model, student_config(model.config, variant, attention and attention == "key-aware"))
    half = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    distillation = Distillation(model, student, half).to(group.device)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, learning_rate, weight_decay=WEIGHT_DECAY, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=half == torch.float16)
    wanted = {
        "teacher": Path(teacher).name, "variant": student.config.name, "key_aware": student.config.key_aware,
        "images": len(files), "steps": steps, "batch_size": batch_size, "processes": group.size, "shortest": shortest,
        "longest": longest, "learning_rate": learning_rate, "precision": precision, "seed": seed,
    }  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    step, rows = _resume(output / "checkpoint.pth", wanted, student, optimizer, scaler)
    if group.leads:
        with replaced_when_done(output / "config.json") as temporary:
            used = {"device": device, "torch": torch.__version__, "tool_version": ld.__version__}
            temporary.write_text(json.dumps(wanted | used, indent=2) + "\n")
    mine = batch_size // group.size
    # Of every step's images this process has those from rank * mine on.
    positions = [step_ * batch_size + group.rank * mine + i for step_ in range(step, steps) for i in range(mine)]
    loader = DataLoader(
        Images(files, positions, batch_size, shortest, longest, seed), mine, num_workers=workers, collate_fn=collate
    )
    model_to_run = group.wrapped(distillation)

    def save(name: str | None = None):
        if not group.leads:
            return
        state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        with replaced_when_done(output / "checkpoint.pth") as temporary:
            torch.save(state | {"step": step, "rows": rows, "wanted": wanted}, temporary)
        with replaced_when_done(output / "log.jsonl") as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        if name:
            ld.save_checkpoint(student, output / name)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    saved, since = time.monotonic(), time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
    with Progress(*columns, console=Console(stderr=True), disable=not group.leads) as progress:
        task = progress.add_task("distilling", total=steps, completed=step)
        try:
            for pixels, mask in loader:
                for parameters in optimizer.param_groups:
                    parameters["lr"] = learning_rate * rate_at((step + 1) / steps)
                mask = None if mask is None else mask.to(group.device, non_blocking=True)
                loss, parts = model_to_run(pixels.to(group.device, non_blocking=True), mask)
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
                scaler.step(optimizer)
                scaler.update()
                step += 1
                seconds = round(time.monotonic() - since, 2)
                rows.append(
                    {"step": step, "loss": loss.item(), **{k: v.item() for k, v in parts.items()}, "seconds": seconds}
                )
                recent = sum(row["loss"] for row in rows[-50:]) / len(rows[-50:])
                progress.update(task, completed=step, description=f"loss {recent:.3f}")
                if step * QUARTERS // steps > (step - 1) * QUARTERS // steps:
                    save(f"student-{100 * (step * QUARTERS // steps) // QUARTERS}.safetensors")
                elif time.monotonic() - saved > SAVE_EVERY:
                    save()
                    saved = time.monotonic()
        finally:
            save()
            group.close()
    if group.leads:
        print(f"{output / 'student-100.safetensors'}: {student.config.name}, {steps} steps of {batch_size} images")


def _resume(path: Path, wanted: dict, student, optimizer, scaler) -> tuple[int, list[dict]]:
    """Load the checkpoint where there is one; return the step to go on with and the log so far."""
    if not path.is_file():
        return 0, []
    state = torch.load(path, map_location="cpu", weights_only=True)
    if state["wanted"] != wanted:
        different = [
            f"{k} {state['wanted'].get(k)!r}, not {v!r}" for k, v in wanted.items() if state["wanted"].get(k) != v
        ]
        raise LiteDetrError(f"{path} is of a training with {', '.join(different)}. Choose another --output.")
    student.load_state_dict(state["student"])
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    return state["step"], state["rows"]


if __name__ == "__main__":
    typer.run(main)
