"""Sine position encodings of maps and of boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TWO_PI = 2 * math.pi


def _interleaved_sine(x: Tensor, features: int, temperature: float) -> Tensor:
    """[...] -> [..., features]: sin and cos of x / temperature^(2 i / features) for i < features / 2, interleaved."""
    i = torch.arange(features // 2, dtype=torch.float32, device=x.device)
    period = temperature ** (2 * i / features)
    angle = x[..., None] / period
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def map_position(
    height: int, width: int, dim: int, mask: Tensor | None, device=None, temperature: float = 20.0, first: float = 1.0
) -> Tensor:
    """Return the encoding of a feature map's pixels, [N or 1, height * width, dim], y before x, counted from `first`
    and normalised by the valid extent; mask [N, height, width], True = padding.  DINO has temperature 20 and counts
    from 1 (models/dino/position_encoding.py, PositionEmbeddingSineHW), Deformable DETR has 10000 and from 0.5."""
    eps = 1e-6
    if mask is None:
        # Without padding the encoding is separable: two short tables instead of a map.
        y = torch.arange(height, dtype=torch.float32, device=device) + first
        x = torch.arange(width, dtype=torch.float32, device=device) + first
        y = _interleaved_sine(y / (height + eps) * _TWO_PI, dim // 2, temperature)
        x = _interleaved_sine(x / (width + eps) * _TWO_PI, dim // 2, temperature)
        position = torch.cat((y[:, None].expand(-1, width, -1), x[None].expand(height, -1, -1)), -1)
        return position.flatten(0, 1)[None]
    valid = (~mask).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    y = (y + (first - 1)) / (y[:, -1:, :] + eps) * _TWO_PI
    x = (x + (first - 1)) / (x[:, :, -1:] + eps) * _TWO_PI
    position = torch.cat((_interleaved_sine(y, dim // 2, temperature), _interleaved_sine(x, dim // 2, temperature)), -1)
    return position.flatten(1, 2)


def box_position(boxes: Tensor, dim: int, order: tuple[int, ...] = (1, 0, 2, 3)) -> Tensor:
    """Return the encoding of boxes (x, y, w, h) in 0..1: [..., 4] -> [..., 4 * dim].  DINO has y before x (models/dino/
    utils.py, gen_sineembed_for_position); Deformable DETR's order is (0, 1, 2, 3) (get_proposal_pos_embed)."""
    if order != (0, 1, 2, 3):
        boxes = boxes.index_select(-1, torch.tensor(order, device=boxes.device))
    return _interleaved_sine(boxes * _TWO_PI, dim, 10000.0).flatten(-2)
