"""The training of the shipped detector, examples/shapes/: its losses, its steps, and how it resumes."""

import json

import numpy as np
import pytest
import torch

import litedetr_deploy as ld
from litedetr_deploy.assets.shapes import CLASS_NAMES, scene
from litedetr_deploy.model.config import parse_variant

SMALL = {"hidden_dim": 64, "num_heads": 2, "dim_feedforward": 64, "decoder_dim_feedforward": 64, "num_queries": 20}


def test_generalized_iou_of_boxes_by_hand():
    from losses import generalized_iou

    a = torch.tensor([0.5, 0.5, 0.4, 0.4], dtype=torch.float64)  # 0.3 to 0.7
    cases = {
        (0.5, 0.5, 0.4, 0.4): 1.0,
        (0.7, 0.5, 0.4, 0.4): 0.08 / 0.24,  # half of it; the hull is the union
        # 0.1 wide apart: no overlap, and the hull is 0.9 by 0.4 around two boxes of 0.16
        (1.0, 0.5, 0.4, 0.4): -(0.36 - 0.32) / 0.36,
    }
    for b, expected in cases.items():
        assert generalized_iou(a, torch.tensor(b, dtype=torch.float64)).item() == pytest.approx(expected, abs=1e-5)


def test_matching_finds_the_permutation():
    from losses import match

    torch.manual_seed(0)
    boxes = [torch.rand(5, 4) * 0.4 + 0.2, torch.rand(2, 4) * 0.4 + 0.2, torch.zeros(0, 4)]
    labels = [torch.arange(5), torch.tensor([3, 3]), torch.zeros(0, dtype=torch.int64)]
    queries = [torch.randperm(8)[: len(one)] for one in boxes]
    predicted, logits = torch.rand(3, 8, 4) * 0.1, torch.full((3, 8, 6), -4.0)
    for image in range(3):
        predicted[image, queries[image]] = boxes[image]
        logits[image, queries[image], labels[image]] = 2.0
    images, found = match(logits, predicted, labels, boxes)
    assert images.tolist() == [0] * 5 + [1] * 2
    assert found.tolist() == torch.cat(queries).tolist()


def test_a_perfect_prediction_costs_nothing():
    from losses import detection_loss

    boxes, labels = torch.rand(3, 4) * 0.4 + 0.2, torch.tensor([0, 2, 1])
    logits = torch.full((1, 5, 4), -20.0)
    logits[0, torch.arange(3), labels] = 20.0
    predicted = torch.cat((boxes, torch.rand(2, 4)))[None]
    matched = torch.zeros(3, dtype=torch.int64), torch.arange(3)
    assert detection_loss(logits, predicted, matched, labels, boxes, 3).item() == pytest.approx(0, abs=1e-4)
    assert detection_loss(logits, predicted, matched, labels, boxes.flip(0), 3).item() > 0.5


def batch(count, side):
    images, labels, boxes = [], [], []
    for index in range(count):
        image, corners, one = scene(index, 5, (side, side))
        corners = torch.from_numpy(corners) / side
        boxes.append(torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1))
        labels.append(torch.from_numpy(one))
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 128 - 1)
    return torch.stack(images), labels, boxes


@pytest.mark.parametrize("variant", ["lite-dino-r26n", "dino-r26n"])
def test_the_loss_falls(variant):
    from trainee import Trainee

    torch.manual_seed(0)
    trainee = Trainee(parse_variant(variant, **SMALL)).train()
    optimizer = torch.optim.AdamW(trainee.parameters(), 1e-3)
    images, labels, boxes = batch(4, 96)
    losses = []
    for _ in range(24):
        loss = trainee.loss(images, labels, boxes)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    assert all(p.grad is not None for p in trainee.parameters())


def test_denoising_queries_see_only_their_group():
    from trainee import _Denoising

    labels, boxes = [torch.tensor([1, 2]), torch.tensor([3])], [torch.rand(2, 4), torch.rand(1, 4)]
    noise = _Denoising(labels, boxes, num_classes=6)
    assert noise.slots == 2 and noise.count == noise.groups * 4 <= 64
    hidden = noise.attention_bias(5).isinf()
    group = torch.arange(noise.count) // 4
    assert (hidden[: noise.count, : noise.count] == (group[:, None] != group)).all()
    assert hidden[noise.count :, : noise.count].all() and not hidden[:, noise.count :].any()
    image, slot, target = noise.positives
    assert len(target) == noise.groups * 3
    # A slightly moved box keeps more than half of its extent around its centre.
    moved, original = noise.boxes[image, slot], torch.cat(boxes)[target]
    assert ((moved[:, :2] - original[:, :2]).abs() <= original[:, 2:] / 2 + 1e-6).all()


@pytest.mark.slow
def test_an_interrupted_training_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, monkeypatch):
    import train

    monkeypatch.setattr(train, "STAGES", ((0.5, 96), (0.5, 128)))
    monkeypatch.setattr(train, "parse_variant", lambda name, **fields: parse_variant(name, **(fields | SMALL)))
    arguments = {
        "output": tmp_path / "whole", "variant": "lite-dino-r26n", "images": 12, "batch_size": 2, "device": "cpu",
        "threads": 2, "workers": 0, "seed": 0, "start": None, "side": None,
    }  # fmt: skip
    train.main(**arguments)
    drawn = []

    def interrupted_scene(index, seed, size):
        drawn.append(index)
        if index == 7 and drawn.count(7) == 1:
            raise KeyboardInterrupt
        return scene(index, seed, size)

    monkeypatch.setattr(train, "scene", interrupted_scene)
    torch.manual_seed(99)  # what another program's random numbers leave behind must not matter
    with pytest.raises(KeyboardInterrupt):
        train.main(**(arguments | {"output": tmp_path / "run"}))
    torch.manual_seed(7)
    train.main(**(arguments | {"output": tmp_path / "run"}))
    assert drawn == [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 9, 10, 11]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    assert json.loads((tmp_path / "run" / "config.json").read_text())["learning_rate"] == train.LEARNING_RATE

    whole, run = (torch.load(tmp_path / name / "checkpoint.pth", weights_only=True) for name in ("whole", "run"))
    for part in ("trainee", "average"):
        assert whole[part].keys() == run[part].keys()
        assert all(torch.equal(whole[part][key], run[part][key]) for key in whole[part])
    for number, state in whole["optimizer"]["state"].items():
        assert all(torch.equal(state[key], run["optimizer"]["state"][number][key]) for key in state)
    assert [row["loss"] for row in whole["rows"]] == [row["loss"] for row in run["rows"]]
    names = ("whole", "run")
    assert len({(tmp_path / name / "model.safetensors").read_bytes() for name in names}) == 1

    arguments["output"] = tmp_path / "run"
    model = ld.load_model(tmp_path / "run" / "model.safetensors")  # what it wrote is a checkpoint like any other
    assert model.config.enc_scale == 3 and model.config.num_expansion == 3 and model.class_names == CLASS_NAMES
    with pytest.raises(SystemExit, match="choose another --output"):
        train.main(**(arguments | {"seed": 1}))

    # Another training begins where this one ended: with no step of its own it writes the same weights.
    more = {"output": tmp_path / "more", "start": str(tmp_path / "run" / "model.safetensors"), "side": 64, "images": 2}
    monkeypatch.setattr(train, "LEARNING_RATE", 0.0)
    train.main(**(arguments | more))
    before, after = model.state_dict(), ld.load_model(tmp_path / "more" / "model.safetensors").state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "running" not in key)
    assert drawn[-2:] == [0, 1]
