"""What tells one detector from another: one dataclass for every variant, and the paper's names for it."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from ..errors import LiteDetrError, nearest

FAMILIES = ("dino", "deformable-detr", "one-stage-deformable-detr", "h-detr")
IMPLEMENTATIONS = ("official", "mmdetection", "detrex")
BACKBONES = ("r50", "r101", "r26n", "swin-t", "swin-l")
ENCODER_LAYERS = 6
# Where the published models of a family or with a backbone differ from DINO R50; r26n is of detectors that are small
# throughout.
_DEFORMABLE_DETR = {"num_queries": 300, "dim_feedforward": 1024, "decoder_dim_feedforward": 1024}
_FIELDS = {
    "deformable-detr": _DEFORMABLE_DETR, "one-stage-deformable-detr": _DEFORMABLE_DETR,
    "h-detr": {"num_queries": 300},
    "r26n": {
        "num_classes": 10, "num_queries": 64, "hidden_dim": 128, "num_heads": 4, "dim_feedforward": 512,
        "decoder_dim_feedforward": 512, "decoder_layers": 3,
    },
    "swin-l": {"window_size": 12},
}  # fmt: skip

_VARIANT = re.compile(
    rf"(?P<lite>lite-)?(?P<family>{'|'.join(FAMILIES)})-(?P<backbone>{'|'.join(BACKBONES)})"
    r"(?:-h(?P<high>\d)l(?P<low>\d)-\(?(?P<between>\d)\+1\)?x(?P<expansions>\d))?",
    re.IGNORECASE,
)


def _whole(default: int, least: int, most: int) -> Any:
    """A field that must be a whole number from `least` to `most`."""
    return field(default=default, metadata={"range": (least, most)})


@dataclass(frozen=True)
class DetectorConfig:
    """A detector with a full-scale or an interleaved (Lite) encoder.

    family: 'dino'; 'deformable-detr', two-stage with iterative box refinement; 'one-stage-deformable-detr', with
        learned queries; or 'h-detr', the two-stage one with learned query content (its mixed selection; of its two
        branches the one-to-one branch).
    implementation: whose details hold where they differ, of which keys and shapes tell nothing.  MMDetection's and
        detrex's DINO have box heads of their own for every layer; detrex's encodes positions as Deformable DETR does;
        all clamp the inverse sigmoid elsewhere.
    The names of the other fields follow the official configuration where it has one (config/DINO/DINO_4scale.py); the
    ops take 8 levels and 8 points at most (kda.h).
    """

    family: str = "dino"
    backbone: str = "r50"
    window_size: int = _whole(7, 1, 64)  # of a Swin backbone
    num_classes: int = _whole(91, 1, 100_000)
    num_queries: int = _whole(900, 1, 100_000)
    hidden_dim: int = _whole(256, 32, 4096)
    num_heads: int = _whole(8, 1, 1024)
    num_levels: int = _whole(4, 3, 8)  # three maps of the backbone, and coarser ones
    encoder_points: int = _whole(4, 1, 8)
    decoder_points: int = _whole(4, 1, 8)
    dim_feedforward: int = _whole(2048, 1, 65536)  # encoder
    decoder_dim_feedforward: int = _whole(2048, 1, 65536)
    encoder_layers: int = _whole(ENCODER_LAYERS, 1, 64)
    decoder_layers: int = _whole(6, 1, 64)
    enc_scale: int = _whole(3, 1, 7)  # how many of the coarse levels are high-level features (paper section 3.2)
    num_expansion: int = _whole(6, 1, 64)  # how many layers update all levels; 6 of 6 is the full-scale encoder
    small_expand: bool = False  # low-level tokens have a light feed-forward network of their own
    key_aware: bool = False  # key-aware deformable attention (paper section 3.3)
    proj_key: bool = False  # encoder attention has its own key projection
    same_loc: bool = False  # encoder attention shares its offsets between levels
    box_refine: bool = True  # layers refine the boxes; only one-stage models can be without
    implementation: str = "official"

    def __post_init__(self):
        def refuse(name, wanted):
            raise LiteDetrError(f"{name} is {getattr(self, name)!r:.80}; it must be {wanted}.")

        for entry in dataclasses.fields(self):
            value, (least, most) = getattr(self, entry.name), entry.metadata.get("range", (0, 0))
            if most and (type(value) is not int or not least <= value <= most):
                refuse(entry.name, f"a whole number from {least} to {most}")
            if isinstance(entry.default, bool) and not isinstance(value, bool):
                refuse(entry.name, "True or False")
        if self.family not in FAMILIES:
            refuse("family", f"one of {', '.join(FAMILIES)}")
        if self.implementation not in IMPLEMENTATIONS:
            refuse("implementation", f"one of {', '.join(IMPLEMENTATIONS)}")
        if not self.box_refine and not self.is_one_stage:
            refuse("box_refine", f"True in {self.family}")
        if self.backbone not in BACKBONES:
            refuse("backbone", f"one of {', '.join(BACKBONES)}")
        if self.enc_scale >= self.num_levels:
            refuse("enc_scale", f"from 1 to {self.num_levels - 1} (the number of high-level maps)")
        if self.encoder_layers % self.num_expansion:
            refuse("num_expansion", f"a divisor of the {self.encoder_layers} encoder layers")
        if self.hidden_dim % self.num_heads or self.hidden_dim // self.num_heads % 4:
            refuse("num_heads", f"such that hidden_dim {self.hidden_dim} / num_heads is a multiple of 4")
        if self.hidden_dim % 32:
            refuse("hidden_dim", "a multiple of 32 (group normalisation has 32 groups)")
        if self.proj_key and not self.key_aware:
            refuse("proj_key", "False when key_aware is False")

    @property
    def full_layers(self) -> tuple[bool, ...]:
        """For every encoder layer, whether it updates all tokens ('F') or the high-level ones ('H'), as the official
        TransformerEncoder.forward has it."""
        every = self.encoder_layers // self.num_expansion
        return tuple((i + 1) % every == 0 for i in range(self.encoder_layers))

    @property
    def is_dino(self) -> bool:
        return self.family == "dino"  # else heads and positions are Deformable DETR's

    @property
    def is_one_stage(self) -> bool:
        return self.family == "one-stage-deformable-detr"

    @property
    def shares_heads(self) -> bool:
        """Whether all decoder layers have one box head."""
        return self.implementation == "official" if self.is_dino else not self.box_refine

    @property
    def is_lite(self) -> bool:
        return self.num_expansion < self.encoder_layers or self.small_expand

    @property
    def name(self) -> str:
        base = f"{self.family}-{self.backbone}"
        if not self.is_lite:
            return base
        # The paper counts a block of two layers whose second is an F layer (HF) as 2+1.
        between = self.encoder_layers // self.num_expansion
        scales = f"h{self.enc_scale}l{self.num_levels - self.enc_scale}"
        return f"lite-{base}-{scales}-{between}+1x{self.num_expansion}"

    @property
    def attention_nodes(self) -> int:
        return self.encoder_layers + self.decoder_layers  # deformable ones, of the exported graph


VARIANT_EXAMPLES = (
    "lite-dino-r50-h3l1-2+1x3, lite-dino-swin-t-h3l1-6+1x1, lite-deformable-detr-r50-h2l2-2+1x3, dino-r50, "
    "h-detr-swin-l"
)


def parse_variant(variant: str, **overrides) -> DetectorConfig:
    """Return the configuration that a name stands for, in the paper's spelling 'Lite-DINO-R50-H3L1-(2+1)x3' too;
    `overrides` replace single fields.  A Lite variant without the encoder's suffix is the paper's best, H3L1-(2+1)x3.
    Only Lite models are key-aware and have the small feed-forward network."""
    match = _VARIANT.fullmatch(str(variant).strip().replace(" ", "-"))
    if not match:
        base = re.split(r"-h\d", str(variant).lower())[0]
        names = map("".join, itertools.product(("lite-", ""), [f"{family}-" for family in FAMILIES], BACKBONES))
        raise LiteDetrError(f"unknown variant {variant!r}. Names look like: {VARIANT_EXAMPLES}.{nearest(base, names)}")
    fields: dict[str, Any] = {"family": match["family"].lower(), "backbone": match["backbone"].lower()}
    fields |= _FIELDS.get(fields["family"], {}) | _FIELDS.get(fields["backbone"], {})
    if fields["family"] == "h-detr":
        fields["window_size"] = 7  # its Swin-L too
    if match["lite"]:
        fields |= {"enc_scale": 3, "num_expansion": 3, "small_expand": True, "key_aware": True}
        if match["high"]:
            high, low, between, expansions = map(int, match.group("high", "low", "between", "expansions"))
            if high + low != 4 or high < 1 or low < 1:
                raise LiteDetrError(f"variant {variant!r}: H{high}L{low} must share out the 4 levels, as H3L1 does.")
            if between * expansions != ENCODER_LAYERS:
                raise LiteDetrError(
                    f"variant {variant!r}: ({between}+1)x{expansions} must multiply to {ENCODER_LAYERS} layers; "
                    "the encoders are (6+1)x1, (3+1)x2, (2+1)x3 and (1+1)x6."
                )
            fields |= {"enc_scale": high, "num_expansion": expansions}
    elif match["high"]:
        raise LiteDetrError(
            f"variant {variant!r} names an interleaved encoder but not a Lite model. Did you mean 'lite-{variant}'?"
        )
    return dataclasses.replace(DetectorConfig(**fields), **overrides)
