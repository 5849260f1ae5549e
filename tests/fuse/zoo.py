"""Small detectors of transformers with random weights, and their ONNX files from both of torch's exporters."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import transformers
from torch import nn
from transformers.models.grounding_dino import modeling_grounding_dino as grounding

SIZE = (64, 96)  # (height, width)
WEIGHTS = 0.15  # times a normal number, added to what transformers initialises: offsets of pixels, unequal logits


def _resnet(**options):
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        **({"out_features": ["stage2", "stage3", "stage4"]} | options),
    )  # fmt: skip


def _rt_resnet():
    return transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def _rt_options(**options):
    return {
        "backbone_config": _rt_resnet(), "encoder_in_channels": [16, 24, 32], "encoder_hidden_dim": 32,
        "decoder_in_channels": [32, 32, 32], "encoder_ffn_dim": 32, "d_model": 32, "num_queries": 12,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "decoder_layers": 2,
        "num_labels": 5, "anchor_image_size": None, "hidden_expansion": 0.5,
    } | options  # fmt: skip


def deformable_detr(**options):
    config = transformers.DeformableDetrConfig(
        backbone_config=_resnet(), d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=12, two_stage_num_proposals=12,
        **({"two_stage": True, "with_box_refine": True, "num_labels": 5} | options),
    )  # fmt: skip
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr():
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**_rt_options()))


def rt_detr_v2(**options):
    return transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**_rt_options(**options)))


def d_fine():
    config = transformers.DFineConfig(**_rt_options(decoder_n_points=[3, 6, 3], num_feature_levels=3))
    return transformers.DFineForObjectDetection(config)


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4, image_size=64,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=4, dim_feedforward=32, num_queries=6, num_labels=5,
    )  # fmt: skip
    return transformers.Mask2FormerForUniversalSegmentation(config)


def grounding_dino():
    config = transformers.GroundingDinoConfig(
        backbone_config=_resnet(),
        text_config=transformers.BertConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        ),
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=12, max_text_len=8,
    )  # fmt: skip
    return transformers.GroundingDinoForObjectDetection(config)


def lw_detr():
    config = transformers.LwDetrConfig(
        backbone_config=transformers.LwDetrViTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, pretrain_image_size=64,
            patch_size=16, num_windows=4, window_block_indices=[0], out_indices=[1, 2],
        ),
        d_model=32, decoder_layers=2, decoder_self_attention_heads=4, decoder_cross_attention_heads=4,
        decoder_ffn_dim=32, num_queries=12, num_labels=5, projector_scale_factors=[2.0, 0.5], group_detr=1,
    )  # fmt: skip
    return transformers.LwDetrForObjectDetection(config)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "deformable_detr": deformable_detr, "rt_detr": rt_detr, "rt_detr_v2": rt_detr_v2, "d_fine": d_fine,
    "mask2former": mask2former, "grounding_dino": grounding_dino, "lw_detr": lw_detr,
}  # fmt: skip
OUTPUTS = {"mask2former": ("class_queries_logits", "masks_queries_logits")}
SIZES = {"lw_detr": (64, 64), "deformable_detr": (128, 160), "grounding_dino": (128, 160)}


class Wrapped(nn.Module):
    """A model of transformers that takes tensors and gives tensors."""

    def __init__(self, name: str, model: nn.Module):
        super().__init__()
        self.model, self.outputs = model, OUTPUTS.get(name, ("logits", "pred_boxes"))
        self.tokens = torch.tensor([[101, 5, 9, 12, 102]]) if name == "grounding_dino" else None

    def forward(self, images, pixel_mask=None):
        options = {} if pixel_mask is None else {"pixel_mask": pixel_mask}
        if self.tokens is not None:
            tokens = self.tokens.expand(images.shape[0], -1)
            options |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        found = self.model(images, **options)
        return tuple(getattr(found, name) for name in self.outputs)


def _text_masks(tokens):
    """Return what Grounding DINO makes of its tokens, as constants: TorchScript exports neither isin nor cummax."""
    special = torch.tensor(grounding.SPECIAL_TOKENS)
    masks, positions = grounding.generate_masks_with_special_tokens_and_transfer_map(tokens[:1], special)
    return lambda ids, special_tokens: (masks.expand(ids.shape[0], -1, -1), positions.expand(ids.shape[0], -1))


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(7)
    return randomised(MODELS[name](**options))


def randomised(model: nn.Module, within: str = "") -> nn.Module:
    """Return a model for inference, with noise on the parameters whose names have a match of the pattern `within`."""
    with torch.no_grad():
        for name, parameter in model.eval().named_parameters():
            if parameter.is_floating_point() and re.search(within, name):
                parameter.add_(torch.randn_like(parameter) * WEIGHTS)
    return model


def _constant_text(model: Wrapped):
    if model.tokens is None:
        return contextlib.nullcontext()
    name = "generate_masks_with_special_tokens_and_transfer_map"
    return mock.patch.object(grounding, name, _text_masks(model.tokens))


def export(
    path: Path, name: str, dynamo: bool, batch=False, sides=False, opset: int = 0, masked=False, **options
) -> Path:  # fmt: skip
    """Write the ONNX file of a small model; batch, sides: whether these are dynamic; masked: it takes a mask."""
    model = Wrapped(name, make(name, **options)).eval()
    return write(path, model, SIZES.get(name, SIZE), dynamo, batch, sides, opset, masked)


def write(
    path: Path, model: Wrapped, size: tuple[int, int], dynamo=False, batch=False, sides=False, opset: int = 0,
    masked=False,
) -> Path:  # fmt: skip
    """Write the ONNX file of a model for images of (height, width) `size`; the rest as in `export`."""
    height, width = size
    n = 2 if batch else 1  # torch.export takes a size of 1 for a constant
    inputs = {"images": torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(3))}
    if masked:
        inputs["pixel_mask"] = torch.ones(n, height, width, dtype=torch.int64)
    first = {"images": 2, "pixel_mask": 1}  # axis of the height
    open_axes = {
        name: ({0: "batch"} if batch else {}) | ({first[name]: "height", first[name] + 1: "width"} if sides else {})
        for name in inputs
    }
    shared = {"input_names": list(inputs), "output_names": list(model.outputs), "verbose": False}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    os.environ["TRANSFORMERS_DISABLE_TORCH_CHECK"] = "1"  # its checks of shapes have no ONNX form
    with torch.no_grad(), warnings.catch_warnings(), _constant_text(model):
        warnings.simplefilter("ignore")
        if dynamo:
            dynamic = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in open_axes.items()}
            # Optimised by the exporter, the file of Deformable DETR lacks a bound that a Clip reads.
            torch.onnx.export(
                model, tuple(inputs.values()), dynamo=True, opset_version=opset or 18,
                optimize=not isinstance(model.model, transformers.DeformableDetrForObjectDetection),
                dynamic_shapes=tuple(dynamic.values()) if batch or sides else None, **shared,
            ).save(path)  # fmt: skip
        else:
            torch.onnx.export(
                model, tuple(inputs.values()), path, dynamo=False, dynamic_axes=open_axes, opset_version=opset or 17,
                **shared,
            )  # fmt: skip
    return path
