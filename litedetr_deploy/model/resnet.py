"""ResNets of bottlenecks with frozen batch norm, as the checkpoints name them (torchvision's layout)."""

from __future__ import annotations

import copy
import itertools
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model")

# Channels of the stem, and bottlenecks of every stage.  r26n is ResNet-26 at 3/8 of the width.
SHAPES = {"r50": (64, (3, 4, 6, 3)), "r101": (64, (3, 4, 23, 3)), "r26n": (24, (2, 2, 2, 2))}


class FrozenBatchNorm2d(nn.Module):
    """Batch norm with constant statistics, eps 1e-5 (DETR's models/backbone.py)."""

    eps = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None] + shift[:, None, None]


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = FrozenBatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(out_channels)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            conv = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, FrozenBatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        y = self.bn3(self.conv3(y))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class ResNet(nn.Module):
    """Images [N, 3, H, W] in; the maps of strides 8, 16 and 32 out."""

    def __init__(self, name: str):
        super().__init__()
        width, stages = SHAPES[name]
        self.out_channels = tuple(width * Bottleneck.expansion << stage for stage in (1, 2, 3))
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        in_channels = width
        for stage, blocks in enumerate(stages):
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(Bottleneck(in_channels, width << stage, 2 if stage > 0 and block == 0 else 1))
                in_channels = (width << stage) * Bottleneck.expansion
            setattr(self, f"layer{stage + 1}", layer)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        maps = [self.layer1(x)]
        for layer in (self.layer2, self.layer3, self.layer4):
            maps.append(layer(maps[-1]))
        return maps[1:]


def folded(model: Model) -> Model:
    """Return a copy of `model` with every frozen batch norm folded."""
    model = copy.deepcopy(model)
    fold_frozen_batch_norm(model)
    return model


def fold_frozen_batch_norm(module: nn.Module) -> None:
    """Fold every frozen batch norm of `module` into the convolution before it, in place, with products in float64: the
    folded weights are the correctly rounded ones."""
    for parent in list(module.modules()):
        for (_, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, FrozenBatchNorm2d):
                scale, shift = norm.double().scale_and_shift()
                conv.weight = nn.Parameter((conv.weight.double() * scale[:, None, None, None]).to(conv.weight.dtype))
                conv.bias = nn.Parameter(shift.to(conv.weight.dtype))
                setattr(parent, norm_name, nn.Identity())
