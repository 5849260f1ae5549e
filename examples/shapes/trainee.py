"""The product's detector with what only training needs: batch norm, denoising queries, the outputs of all layers."""

from __future__ import annotations

import math

import torch
from losses import detection_loss, match
from torch import Tensor, nn

from litedetr_deploy.model.config import DetectorConfig
from litedetr_deploy.model.decoder import inverse_sigmoid
from litedetr_deploy.model.detector import Detector, Encoded, take_tokens
from litedetr_deploy.model.position import box_position
from litedetr_deploy.model.resnet import FrozenBatchNorm2d

DENOISING_QUERIES = 64  # at most, of one image
LABEL_NOISE, BOX_NOISE = 0.5, 1.0  # DINO's


class Trainee(nn.Module):
    def __init__(self, config: DetectorConfig):
        super().__init__()
        self.detector = Detector(config)
        self.label_enc = nn.Embedding(config.num_classes + 1, config.hidden_dim)
        _with_batch_norm(self.detector.backbone)
        _initialise(self.detector)

    def loss(self, images: Tensor, labels: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """The total loss of a batch: images [N, 3, H, W], normalised; labels [K] and boxes [K, 4] (cxcywh in 0..1) of
        every image."""
        detector = self.detector
        encoded = detector.encode(images)
        with torch.autocast(images.device.type, enabled=False):  # boxes want more than bfloat16's 8 bits
            encoded = Encoded(*(x.float() if x is not None and x.is_floating_point() else x for x in encoded))
            indices = encoded.proposal_logits.amax(-1).topk(detector.config.num_queries, dim=1)[1]
            chosen = take_tokens(encoded.features, indices)
            proposed = (detector.enc_out_bbox_embed(chosen) + take_tokens(encoded.proposals, indices)).sigmoid()
            proposed_logits = detector.enc_out_class_embed(chosen)
        all_labels, all_boxes = torch.cat(labels), torch.cat(boxes)
        num_objects = max(len(all_labels), 1)

        noise = _Denoising(labels, boxes, detector.config.num_classes)
        content = detector.tgt_embed.weight[None].expand(len(images), -1, -1)
        content = torch.cat((self.label_enc(noise.labels), content), 1)
        references = torch.cat((noise.boxes, proposed.detach()), 1)
        bias = noise.attention_bias(detector.config.num_queries)
        predictions = self._decode(content, references, encoded, bias)

        total = detection_loss(
            proposed_logits,
            proposed,
            match(proposed_logits, proposed, labels, boxes),
            all_labels,
            all_boxes,
            num_objects,
        )
        for logits, predicted in predictions:
            found_logits, found = logits[:, noise.count :], predicted[:, noise.count :]
            matched = match(found_logits, found, labels, boxes)
            total = total + detection_loss(found_logits, found, matched, all_labels, all_boxes, num_objects)
            image, slot, target = noise.positives
            total = total + detection_loss(
                logits[:, : noise.count],
                predicted[:, : noise.count],
                (image, slot),
                all_labels[target],
                all_boxes[target],
                num_objects * noise.groups,
            )
        return total

    def _decode(self, x: Tensor, boxes: Tensor, encoded: Encoded, bias: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits and boxes after every layer.  Boxes look forward twice (DINO, section 3.5)."""
        detector, decoder = self.detector, self.detector.decoder
        num_levels = encoded.valid_ratios.shape[1]
        refined, predictions = boxes, []
        for layer in decoder.layers:
            references = boxes[:, :, None].expand(-1, -1, num_levels, -1)
            position = decoder.ref_point_head(box_position(boxes, x.shape[-1] // 2))
            x = layer(x, position, references, encoded.memory, encoded.spatial_shapes, None, bias)
            with torch.autocast(x.device.type, enabled=False):
                features = decoder.norm(x.float())
                predicted = (detector.bbox_embed(features) + inverse_sigmoid(refined)).sigmoid()
                predictions.append((detector.class_embed(features), predicted))
                refined = (detector.bbox_embed(x.float()) + inverse_sigmoid(boxes)).sigmoid()
                boxes = refined.detach()
        return predictions


class _Denoising:
    """Contrastive denoising queries (DINO, section 3.3): the objects with noise, slightly and strongly moved.

    labels [N, count] and boxes [N, count, 4] of the queries; positives: image, slot and index of the object (in the
    concatenated objects) of every slightly moved one.
    """

    def __init__(self, labels: list[Tensor], boxes: list[Tensor], num_classes: int):
        n, device = len(labels), labels[0].device
        sizes = torch.tensor([len(x) for x in labels], device=device)
        self.slots = max(int(sizes.max()), 1)
        self.groups = max(1, DENOISING_QUERIES // (2 * self.slots))
        self.count = self.groups * 2 * self.slots
        filled = torch.arange(self.slots, device=device) < sizes[:, None]  # N, slots
        padded_labels = torch.zeros(n, self.slots, dtype=torch.int64, device=device)
        padded_boxes = torch.full((n, self.slots, 4), 0.5, device=device)
        objects = torch.zeros(n, self.slots, dtype=torch.int64, device=device)
        padded_labels[filled], padded_boxes[filled] = torch.cat(labels), torch.cat(boxes)
        objects[filled] = torch.arange(int(sizes.sum()), device=device)

        # N, groups, slightly and strongly moved, slots
        shape = (n, self.groups, 2, self.slots)
        noisy = _other_labels(padded_labels[:, None, None].expand(shape), num_classes)
        filled = filled[:, None, None].expand(shape)
        self.labels = torch.where(filled, noisy, num_classes).flatten(1)  # the last embedding: no object
        strongly = torch.arange(2, device=device)[:, None, None]
        self.boxes = _moved(padded_boxes[:, None, None].expand(*shape, 4), strongly).flatten(1, 3)
        places = (filled & (strongly[..., 0] == 0)).flatten(1).nonzero()
        image, slot = places.unbind(1)
        self.positives = image, slot, objects[image, slot % self.slots]

    def attention_bias(self, num_queries: int) -> Tensor:
        """[count + num_queries] squared: queries see no denoising ones, which see their own group and the queries."""
        group = torch.arange(self.count + num_queries, device=self.labels.device) // (2 * self.slots)
        group[self.count :] = -1
        hidden = (group[None] != -1) & (group[None] != group[:, None])
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -math.inf)


def _other_labels(labels: Tensor, num_classes: int) -> Tensor:
    noisy = torch.rand(labels.shape, device=labels.device) < LABEL_NOISE * 0.5
    return torch.where(noisy, torch.randint_like(labels, num_classes), labels)


def _moved(boxes: Tensor, strongly: Tensor) -> Tensor:
    """Every corner moved by up to half the size, or where `strongly` is 1 by half to one size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    distance = (torch.rand_like(boxes) + strongly) * BOX_NOISE
    sign = torch.randint_like(boxes, 2) * 2 - 1
    corner = torch.cat((centre - half, centre + half), -1) + sign * distance * torch.cat((half, half), -1)
    corner = corner.clamp(0, 1)
    low, high = torch.minimum(corner[..., :2], corner[..., 2:]), torch.maximum(corner[..., :2], corner[..., 2:])
    return torch.cat(((low + high) / 2, (high - low).clamp(min=1e-3)), -1)


def _with_batch_norm(module: nn.Module) -> None:
    """Frozen batch norms, which cannot be trained from nothing, become ordinary ones with the same parameter names."""
    for name, child in module.named_children():
        if isinstance(child, FrozenBatchNorm2d):
            setattr(module, name, nn.BatchNorm2d(len(child.weight), eps=child.eps))
        else:
            _with_batch_norm(child)


def _initialise(detector: Detector) -> None:
    """As the official training begins: heads that say nothing, sampling points that look around in eight directions
    (Deformable DETR, section A.4)."""
    for module in detector.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for projection in detector.input_proj:
        nn.init.xavier_uniform_(projection[0].weight)
        nn.init.zeros_(projection[0].bias)
    nn.init.normal_(detector.level_embed)
    nn.init.normal_(detector.tgt_embed.weight)
    rare = -math.log((1 - 0.01) / 0.01)
    for head in (detector.class_embed, detector.enc_out_class_embed):
        nn.init.constant_(head.bias, rare)
    for head in (detector.bbox_embed, detector.enc_out_bbox_embed):
        nn.init.zeros_(head.layers[-1].weight)
    for layer in (*detector.encoder.layers, *detector.decoder.layers):
        attention = getattr(layer, "cross_attn", None) or layer.self_attn
        nn.init.zeros_(attention.sampling_offsets.weight)
        angle = torch.arange(attention.num_heads) * (2 * math.pi / attention.num_heads)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, attention.num_points + 1)
        offsets = direction[:, None, None] * distance[None, None, :, None]
        offsets = offsets.expand(-1, attention.num_levels, -1, -1)
        attention.sampling_offsets.bias.data = offsets.flatten().clone()
        if attention.attention_weights is not None:
            nn.init.zeros_(attention.attention_weights.weight)
