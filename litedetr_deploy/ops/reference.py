"""The definition of the two attention ops in plain PyTorch (Lite DETR, arXiv 2303.07335, section 3.3).

Every kernel and every lowering is tested against these functions in float64; nothing calls them to deploy.
They are written to be read: four explicit corners per sample, no fused kernel, no care for memory.
"""

import math

import torch
from torch import Tensor

HALF_PIXEL = 0.5  # align_corners = False: pixel centres lie at integer + 0.5


def key_aware_deform_attn(
    query: Tensor, value: Tensor, reference_points: Tensor, sampling_offsets: Tensor, spatial_shapes: Tensor,
    num_heads: int, num_points: int, key: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Key-aware deformable attention: softmax over levels x points of <query, sampled key>, times sampled values.

    Args:
        query: [N, Q, M*D], after the query projection.
        value: [N, S, M*D], after the value projection, padding zeroed.
        reference_points: [N, Q, L, 2] (x, y) or [N, Q, L, 4] (x, y, w, h), in units of the padded map.
        sampling_offsets: [N, Q, M*L*P*2]: pixels for references of width 2, fractions of half the reference box
            divided by P for width 4.
        spatial_shapes: [L, 2] int64, (height, width), fine to coarse; the areas add up to S.
        num_heads, num_points: M and P.
        key: [N, S, M*D]; None: the key is the value.

    Returns:
        [N, Q, M*D] in the dtype of `value`; computed in the wider of the dtypes of `value` and `reference_points`.

    A sample outside the map reads a zero key and a zero value: its logit is 0 and it takes part in the softmax.  Where
    an offset or a reference is NaN or infinite, the samples that it places are outside: neither spreads to the output.
    """
    dtype = torch.promote_types(value.dtype, reference_points.dtype)
    references, offsets = reference_points.to(dtype), sampling_offsets.to(dtype)
    locations = _locations(references, offsets, spatial_shapes, num_heads, num_points)
    values = _sample(value.to(dtype), locations, spatial_shapes)
    keys = values if key is None else _sample(key.to(dtype), locations, spatial_shapes)
    queries = query.to(dtype).unflatten(2, (num_heads, 1, 1, -1))
    return _attend((queries * keys).sum(-1) / math.sqrt(keys.shape[-1]), values).to(value.dtype)


def ms_deform_attn(
    attention_logits: Tensor, value: Tensor, reference_points: Tensor, sampling_offsets: Tensor,
    spatial_shapes: Tensor, num_heads: int, num_points: int,
) -> Tensor:  # fmt: skip
    """Multi-scale deformable attention (Deformable DETR, arXiv 2010.04159, section 4.1), softmax included.

    `attention_logits` is [N, Q, M*L*P], the raw output of its Linear; the rest as in `key_aware_deform_attn`.
    """
    dtype = torch.promote_types(value.dtype, reference_points.dtype)
    references, offsets = reference_points.to(dtype), sampling_offsets.to(dtype)
    locations = _locations(references, offsets, spatial_shapes, num_heads, num_points)
    values = _sample(value.to(dtype), locations, spatial_shapes)
    return _attend(attention_logits.to(dtype).view(locations.shape[:-1]), values).to(value.dtype)


def _attend(logits: Tensor, values: Tensor) -> Tensor:
    """logits [N, Q, M, L, P], values [N, Q, M, L, P, D] -> [N, Q, M*D]; the softmax spans levels and points."""
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    return (weights[..., None] * values).sum((3, 4)).flatten(2)


def _locations(references: Tensor, offsets: Tensor, spatial_shapes: Tensor, num_heads: int, num_points: int) -> Tensor:
    """[N, Q, M, L, P, 2] (x, y); the map spans 0 to 1."""
    offsets = offsets.unflatten(2, (num_heads, len(spatial_shapes), num_points, 2))
    references = references[:, :, None, :, None]
    if references.shape[-1] == 2:
        sizes = spatial_shapes.flip(-1).to(offsets.dtype)[:, None]  # [L, 1, 2], (width, height)
        return references + offsets / sizes
    return references[..., :2] + offsets / num_points * references[..., 2:] * 0.5


def _sample(tokens: Tensor, locations: Tensor, spatial_shapes: Tensor) -> Tensor:
    """Bilinear samples of tokens [N, S, M*D] at locations [N, Q, M, L, P, 2] -> [N, Q, M, L, P, D].

    A corner outside the map contributes nothing, not 0 x its neighbour: NaN and Inf must not leak out of the
    pixels that hold them.  A coordinate that is not a number is outside.
    """
    tokens = tokens.unflatten(2, (locations.shape[2], -1))
    batch = torch.arange(tokens.shape[0], device=tokens.device).view(-1, 1, 1, 1)
    head = torch.arange(tokens.shape[2], device=tokens.device).view(1, 1, -1, 1)
    sampled, start = [], 0
    for level, (height, width) in enumerate(spatial_shapes.tolist()):
        x = locations[:, :, :, level, :, 0] * width - HALF_PIXEL  # [N, Q, M, P], pixels
        y = locations[:, :, :, level, :, 1] * height - HALF_PIXEL
        left, top = x.floor(), y.floor()
        total = torch.zeros((), dtype=tokens.dtype, device=tokens.device)
        for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
            for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                token = start + torch.where(inside, row * width + column, 0).long()
                corner = (column_weight * row_weight)[..., None] * tokens[batch, token, head]
                total = total + torch.where(inside[..., None], corner, 0)
        sampled.append(total)
        start += height * width
    return torch.stack(sampled, 3)
