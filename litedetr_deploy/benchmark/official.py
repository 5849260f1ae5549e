"""The two attention ops in the arithmetic of the official pure-PyTorch code: the rival that needs no library.

It samples level by level with grid_sample, and key and value apart even where they are the same tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import torch_op


@contextlib.contextmanager
def official_attention() -> Iterator[None]:
    """Models run with the official arithmetic in place of our ops, in all threads."""
    ours = torch_op.key_aware_deform_attn, torch_op.ms_deform_attn
    torch_op.key_aware_deform_attn, torch_op.ms_deform_attn = key_aware_deform_attn, ms_deform_attn
    try:
        yield
    finally:
        torch_op.key_aware_deform_attn, torch_op.ms_deform_attn = ours


def key_aware_deform_attn(
    query, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points, key=None
) -> Tensor:
    """As `ops.reference.key_aware_deform_attn`."""
    n, q, channels = query.shape
    locations = _locations(reference_points, sampling_offsets, spatial_shapes, num_heads, num_points)
    keys = _sample(value if key is None else key, locations, spatial_shapes, num_heads)
    values = _sample(value, locations, spatial_shapes, num_heads)
    queries = query.view(n, q, num_heads, 1, -1).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, D]
    logits = queries @ keys.permute(0, 2, 1, 3) / math.sqrt(channels // num_heads)
    return _attend(logits.softmax(-1), values, n)


def ms_deform_attn(
    attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points
) -> Tensor:
    """As `ops.reference.ms_deform_attn`."""
    n, q, _ = attention_logits.shape
    locations = _locations(reference_points, sampling_offsets, spatial_shapes, num_heads, num_points)
    values = _sample(value, locations, spatial_shapes, num_heads)
    logits = attention_logits.view(n, q, num_heads, 1, -1).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, L*P]
    return _attend(logits.softmax(-1), values, n)


def _locations(references: Tensor, offsets: Tensor, spatial_shapes: Tensor, num_heads: int, num_points: int) -> Tensor:
    """[N, Q, M, L, P, 2], the map from 0 to 1"""
    n, q, levels, width = references.shape
    offsets = offsets.view(n, q, num_heads, levels, num_points, 2)
    references = references[:, :, None, :, None]
    if width == 2:
        return references + offsets / spatial_shapes.flip(-1)[:, None]
    return references[..., :2] + offsets / num_points * references[..., 2:] * 0.5


def _sample(tokens: Tensor, locations: Tensor, spatial_shapes: Tensor, num_heads: int) -> Tensor:
    """Samples of tokens [N, S, M*D]: [N*M, D, Q, L*P]"""
    n, _, channels = tokens.shape
    grids = (2 * locations - 1).to(tokens.dtype)
    sampled, maps = [], spatial_shapes.tolist()
    for level, level_tokens in enumerate(tokens.split([height * width for height, width in maps], 1)):
        image = level_tokens.transpose(1, 2).reshape(n * num_heads, channels // num_heads, *maps[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [N*M, Q, P, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    return torch.stack(sampled, -2).flatten(-2)


def _attend(weights: Tensor, values: Tensor, n: int) -> Tensor:
    """weights [N*M, Q, 1, L*P], values [N*M, D, Q, L*P] -> [N, Q, M*D]"""
    output = (weights.to(values.dtype) @ values.permute(0, 2, 3, 1))[:, :, 0]  # [N*M, Q, D]
    return output.unflatten(0, (n, -1)).transpose(1, 2).flatten(2)
