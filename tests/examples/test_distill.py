"""Distillation, examples/distill.py: what the student starts with, what it learns, and how it resumes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import scene
from litedetr_deploy.errors import LiteDetrError

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = {
    "hidden_dim": 64, "num_heads": 2, "dim_feedforward": 64, "decoder_dim_feedforward": 64, "num_queries": 20,
    "decoder_layers": 2, "num_classes": 7,
}  # fmt: skip
FAMILIES = ("dino", "deformable-detr", "h-detr")


def teacher_of(family: str):
    torch.manual_seed(1)
    return ld.load_model(variant=f"{family}-r26n", **SMALL)


def images(count: int = 2, side: int = 128):
    """Images [N, 3, H, W] and a mask: the second image is narrower."""
    batch = [np.array(scene(index, 5, (side, side))[0]) for index in range(count)]
    pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2) / 128 - 1
    mask = torch.zeros(count, side, side, dtype=torch.bool)
    mask[1:, :, side * 3 // 4 :] = True
    return pixels.masked_fill(mask[:, None], 0.0), mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_a_student_of_the_same_architecture_starts_at_loss_0(family, masked):
    from distill import Distillation, make_student

    teacher = teacher_of(family)
    pixels, mask = images()
    loss, parts = Distillation(teacher, make_student(teacher, teacher.config))(pixels, mask if masked else None)
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(dict.fromkeys(parts, 0.0), abs=1e-5)
    assert loss.item() == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_steps_lower_the_loss(family):
    from distill import Distillation, make_student, student_config

    teacher = teacher_of(family)
    config = student_config(teacher.config, f"lite-{family}-r26n-h3l1-2+1x3")
    assert config.name == f"lite-{family}-r26n-h3l1-2+1x3" and config.key_aware and config.num_classes == 7
    distillation = Distillation(teacher, make_student(teacher, config))
    before = {name: value.clone() for name, value in distillation.teacher.state_dict().items()}
    trained = [parameter for parameter in distillation.student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-3)
    pixels, mask = images()
    losses = []
    for _ in range(12):
        loss, _ = distillation(pixels, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1e-3 and losses[-1] < 0.85 * losses[0]
    assert all(torch.equal(before[name], value) for name, value in distillation.teacher.state_dict().items())


def test_what_both_have_is_copied_and_the_rest_changes_nothing_at_first():
    from distill import make_student, student_config

    teacher = teacher_of("dino")
    plain = student_config(teacher.config, "lite-dino-r26n-h3l1-2+1x3", key_aware=False)
    student = make_student(teacher, plain)
    own, given = student.state_dict(), teacher.state_dict()
    new = {name for name in own if name not in given}
    assert {name.rsplit(".", 2)[-2] for name in new} == {"linear12", "linear22", "norm22"}
    assert all(torch.equal(own[name], given[name]) for name in own if name not in new)
    # The light feed-forward network is the identity before its norm, which is that of the teacher's.
    layer = student.encoder.layers[1]
    x = torch.randn(2, 5, 64)
    assert torch.equal(layer.light_feed_forward(x), layer.norm2(x))


def test_another_backbone_is_refused():
    from distill import student_config

    with pytest.raises(LiteDetrError, match="backbone r50, and the teacher has r26n"):
        student_config(teacher_of("dino").config, "lite-dino-r50-h3l1-2+1x3")


def test_generalized_iou_of_pairs_by_hand():
    from distill import generalized_iou

    a = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    b = torch.tensor([[0.7, 0.5, 0.4, 0.4], [1.0, 0.5, 0.4, 0.4], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    expected = [0.08 / 0.24, -(0.36 - 0.32) / 0.36, 0.0]
    assert generalized_iou(a, b).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A teacher's checkpoint and a folder of six images of two sizes."""
    folder = tmp_path_factory.mktemp("distill")
    teacher = folder / "teacher.safetensors"
    ld.save_checkpoint(teacher_of("dino"), teacher)
    (folder / "images").mkdir()
    for index in range(6):
        scene(index, 3, (96, 96 + 32 * (index % 2)))[0].save(folder / "images" / f"{index}.png")
    return teacher, folder / "images"


def options(material, output):
    teacher, folder = material
    return {
        "teacher": str(teacher), "variant": "lite-dino-r26n-h3l1-2+1x3", "images": folder, "output": output,
        "teacher_variant": None, "attention": None, "steps": 8, "batch_size": 2, "shortest": 96, "longest": 160,
        "learning_rate": 1e-3, "precision": "bf16", "device": "cpu", "workers": 0, "seed": 0,
    }  # fmt: skip


def test_an_interrupted_distillation_ends_bit_for_bit_as_an_undisturbed_one(material, tmp_path, monkeypatch):
    import distill

    distill.distil(**options(material, tmp_path / "whole"))
    loads = []

    def interrupted_load(file):
        loads.append(file)
        if len(loads) == 8:
            raise KeyboardInterrupt
        return load_image(file)

    load_image = distill.load_image
    monkeypatch.setattr(distill, "load_image", interrupted_load)
    with pytest.raises(KeyboardInterrupt):
        distill.distil(**options(material, tmp_path / "run"))
    distill.distil(**options(material, tmp_path / "run"))
    whole, run = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("whole", "run"))
    assert all(torch.equal(whole["student"][name], run["student"][name]) for name in whole["student"])
    for number, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(state[key], run["optimizer"]["state"][number][key]) for key in state)
    losses = [[row["loss"] for row in state["rows"]] for state in (whole, run)]
    assert losses[0] == losses[1] and len(losses[0]) == 8

    quarters = sorted(path.name for path in (tmp_path / "run").glob("student-*.safetensors"))
    assert quarters == [f"student-{percent}.safetensors" for percent in (100, 25, 50, 75)]
    student = ld.load_model(tmp_path / "run" / "student-100.safetensors")
    assert student.config.name == "lite-dino-r26n-h3l1-2+1x3" and student.config.num_classes == 7
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 8
    with pytest.raises(LiteDetrError, match="seed 0, not 1"):
        distill.distil(**(options(material, tmp_path / "run") | {"seed": 1}))


@pytest.mark.slow
def test_two_processes_of_torchrun_train_one_student(material, tmp_path):
    teacher, folder = material
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        EXAMPLES / "distill.py", teacher, "--variant", "lite-dino-r26n-h3l1-2+1x3", "--images", folder, "--output",
        tmp_path / "run", "--steps", "4", "--batch-size", "2", "--shortest", "96", "--precision", "fp32",
        "--workers", "0",
    ]  # fmt: skip
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ld.load_model(tmp_path / "run" / "student-100.safetensors").config.num_expansion == 3
