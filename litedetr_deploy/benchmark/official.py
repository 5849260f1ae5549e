"""The two attention ops in the arithmetic of the official pure-PyTorch code: the rival that needs no library.

It samples level by level with grid_sample, in float32 at the least, as PyTorch's autocast does, and key and value apart
even where they are the same tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import torch_op


@contextlib.contextmanager
def official_attention() -> Iterator[None]:
    """Run models with the official arithmetic in place of our ops, in all threads."""
    ours = torch_op.key_aware_deform_attn, torch_op.ms_deform_attn
    torch_op.key_aware_deform_attn, torch_op.ms_deform_attn = key_aware_deform_attn, ms_deform_attn  # type: ignore
    try:
        yield
    finally:
        torch_op.key_aware_deform_attn, torch_op.ms_deform_attn = ours


def key_aware_deform_attn(
    query: Tensor, value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, spatial_shapes: Tensor,
    num_heads: int, num_points: int, key: Tensor | None = None, maps: Sequence | None = None, once: bool = False,
) -> Tensor:  # fmt: skip
    """Compute what `ops.reference.key_aware_deform_attn` defines.

    maps: spatial_shapes as Python numbers, where the device must not be asked for them.
    once: sample the tokens once where key and value are the same, which the official code does not.
    """
    n, q, channels = query.shape
    locations = sampling_locations(reference_points, sampling_offsets, spatial_shapes, num_heads, num_points)
    maps = spatial_shapes.tolist() if maps is None else maps
    values = sample(value, locations, maps)
    keys = values if once and key is None else sample(value if key is None else key, locations, maps)
    queries = query.view(n, q, num_heads, 1, -1).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, D]
    logits = queries @ keys.permute(0, 2, 1, 3) / math.sqrt(channels // num_heads)
    return _attend(logits.softmax(-1), values, n)


def ms_deform_attn(attention_logits, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points):
    """Compute what `ops.reference.ms_deform_attn` defines."""
    n, q, _ = attention_logits.shape
    locations = sampling_locations(reference_points, sampling_offsets, spatial_shapes, num_heads, num_points)
    values = sample(value, locations, spatial_shapes.tolist())
    logits = attention_logits.view(n, q, num_heads, 1, -1).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, L*P]
    return _attend(logits.softmax(-1), values, n)


def sampling_locations(references, offsets, spatial_shapes, num_heads: int, num_points: int) -> Tensor:
    """Return [N, Q, M, L, P, 2], the map from 0 to 1."""
    n, q, levels, width = references.shape
    offsets = _wide(offsets).view(n, q, num_heads, levels, num_points, 2)
    references = references[:, :, None, :, None]
    if width == 2:
        return references + offsets / spatial_shapes.flip(-1)[:, None]
    return references[..., :2] + offsets / num_points * references[..., 2:] * 0.5


def sample(tokens: Tensor, locations: Tensor, maps: Sequence) -> Tensor:
    """Return the samples of tokens [N, S, M*D]: [N*M, D, Q, L*P]."""
    n, heads = tokens.shape[0], locations.shape[2]
    sampled = []
    for level, level_tokens in enumerate(_wide(tokens).split([height * width for height, width in maps], 1)):
        image = level_tokens.transpose(1, 2).reshape(n * heads, -1, *maps[level])
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # [N*M, Q, P, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    return torch.stack(sampled, -2).flatten(-2).to(tokens.dtype)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _attend(weights: Tensor, values: Tensor, n: int) -> Tensor:
    """weights [N*M, Q, 1, L*P], values [N*M, D, Q, L*P] -> [N, Q, M*D]"""
    output = (weights.to(values.dtype) @ values.permute(0, 2, 3, 1))[:, :, 0]  # [N*M, Q, D]
    return output.unflatten(0, (n, -1)).transpose(1, 2).flatten(2)
