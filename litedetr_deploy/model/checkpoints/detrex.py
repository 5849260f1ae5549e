"""State dicts of detrex: DINO and Deformable DETR, with the backbones of detectron2.  Its configurations read images
as RGB and normalise with ImageNet's mean and deviation, in 0..255, as our graph does in 0..1."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from .official import OWNED, UNREAD, Rules, heads, neck, numbers

MARK = r"transformer\.(en|de)coder\.layers\.\d+\.attentions\."


def rules_of(keys: Collection[str], shared: bool | None = None) -> Rules:
    """shared: whether all layers of a one-stage model have one head."""
    one_stage = any(key.startswith("transformer.reference_points.") for key in keys)
    layers = numbers(keys, "transformer.decoder.layers.")
    boxes = dict.fromkeys(OWNED["bbox_embed"], "*")
    return [
        ("label_enc.weight", None),
        ("criterion.*", None),
        *UNREAD,
        *heads(OWNED["class_embed"], boxes, layers, one_stage and shared is not False),
        *neck(keys, "norm"),
        *_backbone(),
        ("query_embedding.weight", "query_embed.weight"),
        ("transformer.level_embeds", "level_embed"),
        ("transformer.*coder.layers.*.ffns.0.layers.0.0.*", "*coder.layers.*.linear1.*"),
        ("transformer.*coder.layers.*.ffns.0.layers.1.*", "*coder.layers.*.linear2.*"),
        ("transformer.encoder.layers.*.attentions.0.*", "encoder.layers.*.self_attn.*"),
        ("transformer.decoder.layers.*.attentions.0.attn.*", "decoder.layers.*.self_attn.*"),
        ("transformer.decoder.layers.*.attentions.1.*", "decoder.layers.*.cross_attn.*"),
        ("transformer.encoder.layers.*.norms.0.*", "encoder.layers.*.norm1.*"),
        ("transformer.encoder.layers.*.norms.1.*", "encoder.layers.*.norm2.*"),
        # In the order of computation; the official names are not.
        ("transformer.decoder.layers.*.norms.0.*", "decoder.layers.*.norm2.*"),
        ("transformer.decoder.layers.*.norms.1.*", "decoder.layers.*.norm1.*"),
        ("transformer.decoder.layers.*.norms.2.*", "decoder.layers.*.norm3.*"),
        ("transformer.*", "*"),
    ]


def _backbone() -> Rules:
    """The rules of detectron2's ResNet; its Swin has our names."""
    convs = {"stem.conv1": ("conv1", "bn1")}
    for stage in range(1, 5):
        convs[f"res{stage + 1}.*.shortcut"] = (f"layer{stage}.*.downsample.0", f"layer{stage}.*.downsample.1")
        for i in (1, 2, 3):
            convs[f"res{stage + 1}.*.conv{i}"] = (f"layer{stage}.*.conv{i}", f"layer{stage}.*.bn{i}")
    return [
        (f"backbone.{their}{middle}.*", f"backbone.{our}.*")
        for their, ours in convs.items()
        for middle, our in ((".norm", ours[1]), ("", ours[0]))
    ] + [("backbone.*", "backbone.*")]


def arguments(contents: Mapping) -> dict:
    """Return what the dialect says, as training arguments."""
    return {"implementation": "detrex"}
