"""Checkpoints of transformers' Deformable DETR: the package's own model and ours compute the same."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import litedetr_deploy as ld

transformers = pytest.importorskip("transformers")

NAMES = ["cat", "dog", "N/A", "bird"]
KINDS = {"two-stage": (True, True), "refined": (False, True), "plain": (False, False)}
# Sums in another order, of logits about 1 and boxes in 0..1.
LOGIT_TOLERANCE, BOX_TOLERANCE = 1e-5, 1e-6


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """The kind, transformers' model with random weights, and the folder that it writes."""
    two_stage, refined = KINDS[request.param]
    torch.manual_seed(7)
    backbone = transformers.ResNetConfig(
        embedding_size=24, hidden_sizes=[96, 192, 384, 768], depths=[2, 2, 2, 2],
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, two_stage=two_stage, with_box_refine=refined, decoder_layers=3, encoder_layers=2,
        d_model=64, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=80,
        num_queries=30, two_stage_num_proposals=30, id2label=dict(enumerate(NAMES)),
    )  # fmt: skip
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # many begin as zeros, which cannot tell
            parameter.add_(torch.randn_like(parameter) * 0.05)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def check_equal(model, ours):
    torch.manual_seed(1)
    images, mask = torch.randn(2, 3, 96, 128), torch.ones(2, 96, 128, dtype=torch.long)
    mask[1, 70:], mask[1, :, 100:] = 0, 0
    for pixels, valid in ((images[:1], None), (images * mask[:, None], mask)):
        with torch.inference_mode():
            wanted = model(pixels, valid)
            found = ours(pixels, None if valid is None else valid == 0)
        assert (found["pred_logits"] - wanted.logits).abs().max() < LOGIT_TOLERANCE
        assert (found["pred_boxes"] - wanted.pred_boxes).abs().max() < BOX_TOLERANCE


def test_the_folder_computes_the_same(case):
    kind, model, folder = case
    ours = ld.load_model(folder)
    assert ours.config.name == ("deformable-detr-r26n" if kind == "two-stage" else "one-stage-deformable-detr-r26n")
    assert ours.config.box_refine == KINDS[kind][1] and ours.config.num_heads == 4
    assert ours.class_names == tuple(NAMES)
    check_equal(model, ours)


def test_a_state_dict_has_the_same_weights(case):
    """Version 5 names parameters in memory otherwise than in its files, which have the older names."""
    _, model, folder = case
    assert any(".mlp.fc1." in key for key in model.state_dict())
    assert any(".layers.0.fc1." in key for key in load_file(folder / "model.safetensors"))
    wanted = ld.load_model(folder).state_dict()
    found = ld.load_model(model.state_dict(), num_heads=4, num_queries=30).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def timm_names(key: str) -> str:
    """The older backbone keys, of timm."""
    before, backbone, rest = key.partition("model.backbone.conv_encoder.model.")
    if not backbone:
        return key
    rest = rest.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
    for stage in range(4):
        rest = rest.replace(f"encoder.stages.{stage}.layers.", f"layer{stage + 1}.")
    rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    for i in range(3):
        rest = rest.replace(f"layer.{i}.convolution", f"conv{i + 1}").replace(f"layer.{i}.normalization", f"bn{i + 1}")
    return backbone + rest


def test_pytorch_model_bin_with_a_backbone_of_timm(case, tmp_path):
    _, _, folder = case
    older = {timm_names(key): value for key, value in load_file(folder / "model.safetensors").items()}
    assert "model.backbone.conv_encoder.model.layer1.0.downsample.1.running_var" in older
    torch.save(older, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    found, wanted = ld.load_model(tmp_path).state_dict(), ld.load_model(folder).state_dict()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())


def test_saved_under_official_keys(case, tmp_path):
    _, _, folder = case
    model = ld.load_model(folder)
    ld.save_checkpoint(model, tmp_path / "model.safetensors")
    again = ld.load_model(tmp_path / "model.safetensors")
    assert again.config == model.config and again.class_names == model.class_names
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())


def refusal(checkpoint, **options) -> str:
    with pytest.raises(ld.LiteDetrError) as error:
        ld.load_model(checkpoint, **options)
    return str(error.value)


def test_what_is_wrong_with_keys_is_named(case):
    _, _, folder = case
    weights = load_file(folder / "model.safetensors")
    key = "model.decoder.layers.1.self_attn.k_proj.weight"
    options = {"num_heads": 4, "num_queries": 30}
    broken = {k: v for k, v in weights.items() if k != key}
    assert f"missing: {key}. " in refusal(broken, **options)
    assert f"misshapen: {key} is [3, 64], must be [64, 64]" in refusal(weights | {key: torch.zeros(3, 64)}, **options)
    assert "unexpected: extra.weight" in refusal(weights | {"extra.weight": torch.zeros(3)}, **options)
    mixed = weights | {"transformer.encoder.layers.0.self_attn.value_proj.bias": torch.zeros(64)}
    assert "mixes the key names of transformers (model." in refusal(mixed, **options)


def test_what_is_wrong_with_a_folder_is_named(case, tmp_path):
    _, _, folder = case
    config = json.loads((folder / "config.json").read_text())

    def written(**fields):
        (tmp_path / "config.json").write_text(json.dumps(config | fields))
        return tmp_path

    assert "no weights: it lacks model.safetensors and pytorch_model.bin" in refusal(written())
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    assert ld.load_model(written()).config.num_queries == 30
    assert "says model_type = 'detr'" in refusal(written(model_type="detr"))
    assert "says dilation = True" in refusal(written(dilation=True))
    assert "says position_embedding_type = 'learned'" in refusal(written(position_embedding_type="learned"))
    assert "4 attention heads in the encoder and 2 in the decoder" in refusal(written(decoder_attention_heads=2))
    assert "hidden_dim is 64 by the weights, 128 by" in refusal(written(d_model=128))
    assert "class_names is a list of 2" in refusal(written(id2label={"0": "cat", "1": "dog"}))
    contents = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(contents[:-9])
    assert "is not a readable safetensors file" in refusal(written())
    (tmp_path / "config.json").write_text("{")
    assert "is not a JSON object" in refusal(tmp_path)


def test_a_hub_name_is_looked_up_in_the_cache(case, tmp_path, monkeypatch):
    """The cache is laid out as huggingface_hub does it; nothing is fetched."""
    constants = pytest.importorskip("huggingface_hub.constants")
    _, _, folder = case
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert "hf download" in refusal("someone/deformable-detr")
    model = tmp_path / "models--someone--deformable-detr"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots").mkdir()
    (model / "snapshots" / ("0" * 40)).symlink_to(folder)
    assert ld.load_model("someone/deformable-detr").class_names == tuple(NAMES)
