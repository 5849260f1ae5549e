"""The detector: backbone, encoder, query selection, decoder and heads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import DetectorConfig
from .decoder import MLP, Decoder
from .encoder import Encoder
from .position import box_position, map_position
from .resnet import ResNet
from .swin import SHAPES as SWINS
from .swin import SwinTransformer


class Encoded(NamedTuple):
    """What the encoder and the scoring of its tokens leave to the decoder."""

    memory: Tensor  # [N, S, dim]
    spatial_shapes: Tensor  # [L, 2] int64, (height, width)
    valid_ratios: Tensor  # [N or 1, L, 2], (x, y)
    padding_mask: Tensor | None  # [N, S], True = padding
    # In one-stage models the queries are learned, and nothing is here.
    features: Tensor | None = None  # [N, S, dim], of the tokens that compete to become queries
    proposals: Tensor | None = None  # [N or 1, S, 4], their boxes before the sigmoid
    proposal_logits: Tensor | None = None  # [N, S, classes that count in the ranking]


class Detector(nn.Module):
    """DINO, Deformable DETR or H-DETR, with a full-scale or an interleaved encoder.

    Sources: Lite DETR (arXiv 2303.07335), DINO (arXiv 2203.03605), Deformable DETR (arXiv 2010.04159), H-DETR (arXiv
    2207.13080); official models/dino/dino.py and deformable_transformer.py, models/deformable_detr.py.
    """

    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.config = config
        self.class_names: tuple[str, ...] | None = None  # of every label, where they are known
        self.forced_variant: str | None = None  # what `load_model` was told to overrule
        dim = config.hidden_dim
        swin = config.backbone in SWINS
        self.backbone = SwinTransformer(config.backbone, config.window_size) if swin else ResNet(config.backbone)
        channels = self.backbone.out_channels
        self.input_proj = nn.ModuleList(_projection(c, dim, 1) for c in channels)
        for level in range(len(channels), config.num_levels):
            self.input_proj.append(_projection(channels[-1] if level == len(channels) else dim, dim, 3))
        self.level_embed = nn.Parameter(torch.randn(config.num_levels, dim))
        self.encoder = Encoder(config)
        if config.is_one_stage:
            self.query_embed = nn.Embedding(config.num_queries, 2 * dim)  # positions and content
            self.reference_points = nn.Linear(dim, 2)
        else:
            self.enc_output = nn.Linear(dim, dim)
            self.enc_output_norm = nn.LayerNorm(dim)
            self.enc_out_class_embed = nn.Linear(dim, config.num_classes)
            self.enc_out_bbox_embed = MLP(dim, dim, 4, 3)
            if not config.is_dino:
                self.pos_trans = nn.Linear(2 * dim, 2 * dim)
                self.pos_trans_norm = nn.LayerNorm(2 * dim)
            if config.family != "deformable-detr":
                self.tgt_embed = nn.Embedding(config.num_queries, dim)
        self.decoder = Decoder(config)
        self.class_embed = nn.Linear(dim, config.num_classes)
        heads = [MLP(dim, dim, 4, 3) for _ in range(1 if config.shares_heads else config.decoder_layers)]
        self.bbox_embed = heads[0] if config.shares_heads else nn.ModuleList(heads)

    def forward(
        self, images: Tensor, pixel_mask: Tensor | None = None, topk_indices: Tensor | None = None
    ) -> dict[str, Tensor]:
        """images [N, 3, H, W], normalised with ImageNet's mean and deviation; pixel_mask [N, H, W], True = padding at
        the bottom and the right; topk_indices [N, Q] forces the tokens that become queries.

        Returns pred_logits [N, Q, classes]; pred_boxes [N, Q, 4], cxcywh in 0..1 of the unpadded image; memory
        [N, S, dim], the encoder's output; proposal_scores [N, S], by which tokens are ranked; topk_indices [N, Q].  In
        a one-stage model the learned queries stand for the tokens: all score 0, and all are taken.
        """
        return self.decode(self.encode(images, pixel_mask), topk_indices)

    def decode(self, encoded: Encoded, topk_indices: Tensor | None = None) -> dict[str, Tensor]:
        """Select queries and refine them to detections; returns what `forward` does."""
        if self.config.is_one_stage:
            return self._decode_learned(encoded, topk_indices)
        proposal_scores = encoded.proposal_logits.amax(-1)
        if topk_indices is None:
            topk_indices = proposal_scores.topk(self.config.num_queries, dim=1)[1]
        selected = take_tokens(encoded.features, topk_indices)
        boxes = (self.enc_out_bbox_embed(selected) + take_tokens(encoded.proposals, topk_indices)).sigmoid()
        if self.config.is_dino:  # positions follow the boxes
            content, position = self.tgt_embed.weight[None], None
        else:
            dim = self.config.hidden_dim
            embedded = self.pos_trans_norm(self.pos_trans(box_position(boxes, dim // 2, (0, 1, 2, 3))))
            content = self.tgt_embed.weight[None] if self.config.family == "h-detr" else embedded[..., dim:]
            position = embedded[..., :dim]
        return self._refine(content, boxes, position, encoded, proposal_scores, topk_indices)

    def _decode_learned(self, encoded: Encoded, topk_indices: Tensor | None) -> dict[str, Tensor]:
        batch = encoded.memory.shape[0]
        position, content = (half[None].expand(batch, -1, -1) for half in self.query_embed.weight.chunk(2, 1))
        scores = encoded.memory[:, :1, 0] * 0.0  # depends on the images: an exporter keeps it as an output
        scores = scores.expand(-1, self.config.num_queries)
        if topk_indices is None:
            topk_indices = torch.arange(self.config.num_queries, device=scores.device)[None].expand(batch, -1)
        points = self.reference_points(position).sigmoid()
        return self._refine(content, points, position, encoded, scores, topk_indices)

    def _refine(self, content, boxes, position, encoded: Encoded, proposal_scores, topk_indices) -> dict[str, Tensor]:
        heads = [self.bbox_embed] * self.config.decoder_layers if self.config.shares_heads else self.bbox_embed
        queries, boxes = self.decoder(content, boxes, position, heads, encoded)
        found = {"pred_logits": self.class_embed(queries), "pred_boxes": boxes, "memory": encoded.memory}
        return found | {"proposal_scores": proposal_scores, "topk_indices": topk_indices}

    def encode(self, images: Tensor, pixel_mask: Tensor | None = None, maps: list[Tensor] | None = None) -> Encoded:
        """Compute everything before the decoder, as `forward` does; maps: what `project` gave, where it is known."""
        maps = self.project(images) if maps is None else maps
        shapes = [tuple(m.shape[-2:]) for m in maps]
        spatial_shapes = sizes_tensor([size for shape in shapes for size in shape], images.device).view(-1, 2)
        tokens = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        masks = [None if pixel_mask is None else resize_mask(pixel_mask, h, w) for h, w in shapes]
        as_dino = self.config.is_dino and self.config.implementation != "detrex"
        origin = {} if as_dino else {"temperature": 10000.0, "first": 0.5}
        positions = [
            map_position(h, w, self.config.hidden_dim, mask, images.device, **origin) + self.level_embed[level]
            for level, ((h, w), mask) in enumerate(zip(shapes, masks))
        ]
        position = torch.cat(positions, 1)
        padding_mask = None if pixel_mask is None else torch.cat([mask.flatten(1) for mask in masks], 1)
        # Valid extents of every level in pixels: [N or 1, L, 2] (x, y).
        extents = torch.stack([valid_extent(h, w, mask, images.device) for (h, w), mask in zip(shapes, masks)], 1)
        sizes = torch.stack((spatial_shapes[:, 1], spatial_shapes[:, 0]), -1).float()
        valid_ratios = extents / sizes
        centres = torch.cat([pixel_centres(h, w, images.device) for h, w in shapes])  # S, 2, in pixels
        level_of_token = torch.cat([torch.full((h * w,), i, device=images.device) for i, (h, w) in enumerate(shapes)])
        centres = centres[None] / extents[:, level_of_token]  # N or 1, S, 2, in 0..1 of the valid extent

        num_low = sum(h * w for h, w in shapes[: self.config.num_levels - self.config.enc_scale])
        references = (centres[:, :, None] * valid_ratios[:, None]).expand(images.shape[0], -1, -1, -1)
        memory = self.encoder(tokens, position, references, spatial_shapes, num_low, padding_mask)

        if self.config.is_one_stage:
            return Encoded(memory, spatial_shapes, valid_ratios, padding_mask)
        features, proposals = self._proposals(memory, centres, level_of_token, padding_mask)
        head = self.enc_out_class_embed  # tokens are ranked by the best logit of all classes, or by the first's
        is_dino = self.config.is_dino
        logits = head(features) if is_dino else nn.functional.linear(features, head.weight[:1], head.bias[:1])
        return Encoded(memory, spatial_shapes, valid_ratios, padding_mask, features, proposals, logits)

    def project(self, images: Tensor) -> list[Tensor]:
        """Return the projected maps of all levels, [N, dim, h, w] each."""
        backbone_maps = self.backbone(images)
        maps = [projection(m) for projection, m in zip(self.input_proj, backbone_maps)]
        x = backbone_maps[-1]
        for projection in self.input_proj[len(backbone_maps) :]:
            x = projection(x)
            maps.append(x)
        return maps

    def _proposals(self, memory, centres, level_of_token, padding_mask) -> tuple[Tensor, Tensor]:
        """Return features [N, S, dim] that compete to become queries, and boxes [N or 1, S, 4] before the sigmoid.  A
        token whose box reaches beyond (0.01, 0.99), or that is padding, has its memory zeroed and an infinite box, and
        still competes (official models/dino/utils.py, gen_encoder_output_proposals)."""
        side = 0.05 * 2.0 ** level_of_token.float()
        boxes = torch.cat((centres, side[None, :, None].expand(centres.shape[0], -1, 2)), -1)
        valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
        if padding_mask is not None:
            valid = valid & ~padding_mask[..., None]
        proposals = torch.log(boxes / (1 - boxes)).masked_fill(~valid, float("inf"))
        features = self.enc_output_norm(self.enc_output(memory.masked_fill(~valid, 0.0)))
        return features, proposals


def _projection(in_channels: int, dim: int, kernel: int) -> nn.Sequential:
    stride, padding = (2, 1) if kernel == 3 else (1, 0)
    return nn.Sequential(nn.Conv2d(in_channels, dim, kernel, stride, padding), nn.GroupNorm(32, dim))


def resize_mask(mask: Tensor, height: int, width: int) -> Tensor:
    """Nearest-neighbour resize [N, H, W] -> [N, height, width], with F.interpolate's float32 index arithmetic: ONNX
    Resize rounds the indices differently where a product is nearly whole."""
    for dim, size in ((1, height), (2, width)):
        old = mask.shape[dim]
        index = (torch.arange(size, dtype=torch.float32, device=mask.device) * (old / size)).floor().long()
        mask = mask.index_select(dim, index.clamp(max=old - 1))
    return mask


def valid_extent(height: int, width: int, mask: Tensor | None, device=None) -> Tensor:
    """Return the unpadded (width, height) of a map in pixels: [N, 2], or [1, 2] without a mask."""
    if mask is None:
        return sizes_tensor((width, height), device).float()[None]
    valid = ~mask
    return torch.stack((valid[:, 0, :].sum(1), valid[:, :, 0].sum(1)), -1).float()


def sizes_tensor(sizes, device=None) -> Tensor:
    """Return sizes as an int64 vector; they stay symbolic where torch.export traces with dynamic sizes."""
    return torch.cat([torch.full((1,), size, dtype=torch.int64, device=device) for size in sizes])


def pixel_centres(height: int, width: int, device=None) -> Tensor:
    """[height * width, 2]: (x + 0.5, y + 0.5) in row-major order."""
    y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
    x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
    return torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1)


def take_tokens(x: Tensor, indices: Tensor) -> Tensor:
    """x [N or 1, S, C], indices [N, Q] -> [N, Q, C].  As rows of one matrix: the fastest gather everywhere."""
    n, s, _ = x.shape
    if n == 1:
        return nn.functional.embedding(indices, x[0])
    rows = indices + torch.arange(n, device=x.device)[:, None] * s
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, (n, -1))
