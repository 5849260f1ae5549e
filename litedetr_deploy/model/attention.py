"""Multi-head attention modules: deformable (key-aware or plain) and dense."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import torch_op


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention with all the switches of the official module (models/dino/ops/modules/
    ms_deform_attn.py).  Key-aware (paper section 3.3), the attention weights are a softmax over <query, sampled key>,
    otherwise over a Linear of the query.  Sampling, softmax and weighted sum are one op (`litedetr_deploy.ops`)."""

    def __init__(self, dim: int, num_heads, num_levels, num_points, key_aware, proj_key=False, same_loc=False):
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.same_loc = same_loc
        offset_levels = 1 if same_loc else num_levels
        self.sampling_offsets = nn.Linear(dim, num_heads * offset_levels * num_points * 2)
        self.value_proj = nn.Linear(dim, dim)
        self.query_proj = nn.Linear(dim, dim) if key_aware else None
        self.attention_weights = None if key_aware else nn.Linear(dim, num_heads * num_levels * num_points)
        self.key_proj = nn.Linear(dim, dim) if proj_key else None
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, query: Tensor, reference_points, tokens, spatial_shapes, padding_mask=None) -> Tensor:
        """query [N, Q, dim] with its position added, reference_points [N, Q, L, 2 or 4], tokens [N, S, dim],
        spatial_shapes [L, 2] (height, width), padding_mask [N, S] True = padding -> [N, Q, dim]."""
        offsets = self.sampling_offsets(query)
        if self.same_loc:
            offsets = offsets.unflatten(-1, (self.num_heads, 1, -1)).expand(-1, -1, -1, self.num_levels, -1).flatten(2)

        def zero_padding(x: Tensor) -> Tensor:
            return x if padding_mask is None else x.masked_fill(padding_mask[..., None], 0.0)

        value = zero_padding(self.value_proj(tokens))
        sampled = value, reference_points, offsets, spatial_shapes, self.num_heads, self.num_points
        if self.query_proj is None:
            return self.output_proj(torch_op.ms_deform_attn(self.attention_weights(query), *sampled))
        key = None if self.key_proj is None else zero_padding(self.key_proj(tokens))
        return self.output_proj(torch_op.key_aware_deform_attn(self.query_proj(query), *sampled, key))


class SelfAttention(nn.Module):
    """Dense self-attention with the parameter names of torch.nn.MultiheadAttention, written out so that the exported
    graph has three projections, two MatMuls and one Softmax."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * dim))
        self.out_proj = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """query [N, Q, dim], also the key; value [N, Q, dim]; bias [Q, Q] is added to the logits -> [N, Q, dim]."""
        n, q, dim = query.shape

        def heads(x: Tensor, part: int) -> Tensor:  # [N, M, Q, D]
            rows = slice(part * dim, (part + 1) * dim)
            x = nn.functional.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        scaled_query = heads(query, 0) * (dim // self.num_heads) ** -0.5
        logits = scaled_query @ heads(query, 1).transpose(2, 3)
        attention = (logits if bias is None else logits + bias).softmax(-1)
        return self.out_proj((attention @ heads(value, 2)).transpose(1, 2).flatten(2))
