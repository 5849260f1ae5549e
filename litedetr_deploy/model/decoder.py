"""The decoder: layers that refine boxes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .attention import DeformableAttention, SelfAttention
from .config import DetectorConfig
from .position import box_position

if TYPE_CHECKING:
    from .detector import Encoded


class MLP(nn.Module):
    """Linears with ReLU between them."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, num_layers: int):
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(dims, dims[1:]))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def inverse_sigmoid(x: Tensor, eps: float = 1e-3) -> Tensor:
    """Of x in 0..1 (official util/misc.py, with its eps)."""
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


class DecoderLayer(nn.Module):
    """Self-attention (norm2), deformable cross-attention (norm1), feed-forward (norm3)."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        dim, hidden = config.hidden_dim, config.decoder_dim_feedforward
        # The official decoder never has proj_key or same_loc.
        heads, levels, points = config.num_heads, config.num_levels, config.decoder_points
        self.cross_attn = DeformableAttention(dim, heads, levels, points, config.key_aware)
        self.norm1 = nn.LayerNorm(dim)
        self.self_attn = SelfAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, x, position, boxes, memory, spatial_shapes, padding_mask, attention_bias=None) -> Tensor:
        x = self.norm2(x + self.self_attn(x + position, x, attention_bias))
        x = self.norm1(x + self.cross_attn(x + position, boxes, memory, spatial_shapes, padding_mask))
        return self.norm3(x + self.linear2(self.linear1(x).relu()))


class Decoder(nn.Module):
    """In DINO queries follow the boxes (dynamic anchors) and features are normalised at the end; in Deformable DETR
    the positions of queries stay."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        dim = config.hidden_dim
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(dim) if config.is_dino else nn.Identity()
        self.ref_point_head = MLP(2 * dim, dim, dim, 2) if config.is_dino else None
        self.box_refine = config.box_refine
        # Of the inverse sigmoid, in the refinement and at the end.
        source = config.implementation
        self.eps = 1e-3 if config.is_dino or source == "detrex" else 1e-5
        self.last_eps = 1e-5 if source == "mmdetection" else self.eps

    def forward(self, x: Tensor, boxes: Tensor, position: Tensor | None, box_heads, encoded: Encoded):
        """x [N or 1, Q, dim] and boxes [N, Q, 4] (cxcywh in 0..1 of the unpadded image), or points [N, Q, 2] in their
        place, start the refinement; position [N, Q, dim] of the queries, None in DINO; box_heads: one for every layer.
        Returns the last layer's features,
        normalised in DINO, and boxes [N, Q, 4]."""
        ratios = encoded.valid_ratios
        for layer, box_head in zip(self.layers, box_heads):
            if encoded.padding_mask is None:  # every valid ratio is 1
                references, level_0 = torch.cat([boxes[:, :, None]] * ratios.shape[1], 2), boxes
            else:
                references = boxes[:, :, None] * torch.cat([ratios] * (boxes.shape[-1] // 2), -1)[:, None]
                level_0 = references[:, :, 0]
            if self.ref_point_head is not None:
                position = self.ref_point_head(box_position(level_0, x.shape[-1] // 2))
            x = layer(x, position, references, encoded.memory, encoded.spatial_shapes, encoded.padding_mask)
            last = layer is self.layers[-1]
            before = inverse_sigmoid(boxes, self.last_eps if last else self.eps)
            before = nn.functional.pad(before, (0, 4 - boxes.shape[-1]))  # points have no size yet
            if self.box_refine and not last:
                # References are refined with the features before the norm, final boxes with those after it.
                boxes = (box_head(x) + before).sigmoid()
        x = self.norm(x)
        return x, (box_head(x) + before).sigmoid()
