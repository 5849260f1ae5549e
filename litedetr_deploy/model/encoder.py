"""The interleaved multi-scale encoder (paper section 3.2); the full-scale encoder is its case of F layers only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import DeformableAttention
from .config import DetectorConfig


class EncoderLayer(nn.Module):
    """One layer; linear12, linear22, norm22: the light feed-forward network of the low-level tokens, in F layers of
    models with `small_expand`."""

    def __init__(self, config: DetectorConfig, small_expand: bool):
        super().__init__()
        dim, hidden = config.hidden_dim, config.dim_feedforward
        heads, levels, points = config.num_heads, config.num_levels, config.encoder_points
        switches = config.key_aware, config.proj_key, config.same_loc
        self.self_attn = DeformableAttention(dim, heads, levels, points, *switches)
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.small_expand = small_expand
        if small_expand:
            self.linear12 = nn.Linear(dim, dim)
            self.linear22 = nn.Linear(dim, dim)
            self.norm22 = nn.LayerNorm(dim)

    def attend(self, query, position, reference_points, tokens, spatial_shapes, padding_mask) -> Tensor:
        """query [N, Q, dim] attends to tokens [N, S, dim]; only the query gets its position."""
        attended = self.self_attn(query + position, reference_points, tokens, spatial_shapes, padding_mask)
        return self.norm1(query + attended)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.norm2(x + self.linear2(self.linear1(x).relu()))

    def light_feed_forward(self, x: Tensor) -> Tensor:
        return self.norm22(x + self.linear22(self.linear12(x).relu()))


class Encoder(nn.Module):
    """Update the high-level tokens in every layer and the low-level ones in F layers only."""

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.full_layers = config.full_layers
        self.layers = nn.ModuleList(
            EncoderLayer(config, small_expand=full and config.small_expand) for full in self.full_layers
        )

    def forward(self, tokens, position, reference_points, spatial_shapes, num_low: int, padding_mask) -> Tensor:
        """tokens [N, S, dim], fine to coarse; position [N or 1, S, dim]; reference_points [N, S, L, 2]; the first
        `num_low` tokens are low-level; padding_mask [N, S] True = padding or None.  -> memory [N, S, dim]."""
        high_position, high_references = position[:, num_low:], reference_points[:, num_low:]
        low, high = tokens[:, :num_low], tokens[:, num_low:]  # kept apart: an exported graph need not split them again
        for full, layer in zip(self.full_layers, self.layers):
            if full:
                tokens = layer.attend(tokens, position, reference_points, tokens, spatial_shapes, padding_mask)
                if layer.small_expand:
                    low = layer.light_feed_forward(tokens[:, :num_low])
                    high = layer.feed_forward(tokens[:, num_low:])
                    tokens = torch.cat((low, high), 1)
                else:
                    tokens = layer.feed_forward(tokens)
                    low, high = tokens[:, :num_low], tokens[:, num_low:]
            else:
                high = layer.attend(high, high_position, high_references, tokens, spatial_shapes, padding_mask)
                high = layer.feed_forward(high)
                tokens = torch.cat((low, high), 1)
        return tokens
