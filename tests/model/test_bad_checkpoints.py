"""Checkpoints that are not what is said of them, or no checkpoints: each message says what, the value and the fix."""

import argparse
import dataclasses
import json
import os
import pickle
import re
import tarfile

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import litedetr_deploy as ld
from litedetr_deploy import cli
from litedetr_deploy.artifact import METADATA_KEY
from litedetr_deploy.model.checkpoints.official import official_key, rules
from litedetr_deploy.model.config import DetectorConfig, parse_variant

SHIPPED = "lite-dino-shapes"
H2 = "lite-dino-r26n-h2l2-2+1x3"
H3 = "lite-dino-r26n-h3l1-2+1x3"
# What a configuration is read from.
READ = [
    "transformer.level_embed",
    "transformer.tgt_embed.weight",
    "transformer.enc_output.weight",
    "transformer.encoder.layers.0.self_attn.sampling_offsets.weight",
    "transformer.decoder.layers.0.cross_attn.sampling_offsets.weight",
    "transformer.encoder.layers.0.linear1.weight",
    "transformer.encoder.layers.1.linear12.weight",
    "transformer.decoder.layers.0.linear1.weight",
    "class_embed.0.weight",
    "input_proj.0.0.weight",
    "backbone.0.body.layer3.0.conv3.weight",
]


@pytest.fixture(scope="module")
def shipped():
    return ld.load_model(SHIPPED)


@pytest.fixture(scope="module")
def official(shipped):
    """The shipped detector's weights under official keys."""
    return {official_key(key, shipped.config): value for key, value in shipped.state_dict().items()}


def saved(path, state_dict, **arguments):
    torch.save({"model": state_dict, "args": argparse.Namespace(**arguments)}, path)
    return path


def refusal(checkpoint, variant=None, **options) -> str:
    with pytest.raises(ld.LiteDetrError) as error:
        ld.load_model(checkpoint, variant, **options)
    return str(error.value)


# Who says what


def test_a_variant_against_the_training_arguments():
    message = refusal(SHIPPED, H2)
    assert f"enc_scale (how many levels are high-level) is 2 by the variant '{H2}', 3 by the checkpoint's" in message
    assert "--force-variant" in message


def test_a_forced_variant_is_recorded(shipped):
    assert shipped.forced_variant is None
    model = ld.load_model(SHIPPED, H2, force_variant=True)
    assert model.config.name == H2
    assert f"2 by the variant '{H2}', 3 by the checkpoint's training arguments" in model.forced_variant
    assert ld.load_model(SHIPPED, H3, force_variant=True).forced_variant is None  # nothing to overrule


@pytest.mark.parametrize("variant", ["lite-dino-r26n", H3, "Lite-DINO-R26N-H3L1-(2+1)x3"])
def test_a_variant_that_agrees(variant, shipped):
    assert ld.load_model(SHIPPED, variant).config == shipped.config


def test_a_name_without_suffix_stands_for_the_default(tmp_path, official):
    path = saved(tmp_path / "weights.pth", official, enc_scale=2)
    assert "is 3 by the variant 'lite-dino-r26n', 2 by the checkpoint's" in refusal(path, "lite-dino-r26n")
    assert ld.load_model(path).config.name == H2


@pytest.mark.parametrize("options", [[], ["--recipe"]])
def test_the_command_stops(tmp_path, options):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[export]\nvariant = "{H2}"\n')
    said = ["--recipe", str(recipe)] if options else ["--variant", H2]
    output = tmp_path / "model.onnx"
    result = CliRunner().invoke(cli.app, ["export", SHIPPED, "-o", str(output), "--image-size", "256x256", *said])
    assert result.exit_code == 2
    assert f"is 2 by the variant '{H2}', 3 by the checkpoint's training arguments" in " ".join(result.stderr.split())
    assert not output.exists()


def test_the_file_name_against_the_arguments_and_the_variant(tmp_path, official):
    path = saved(tmp_path / "shapes_s2ex3.pth", official, enc_scale=3)
    assert "is 3 by the checkpoint's training arguments, 2 by the file's name 'shapes_s2ex3.pth'" in refusal(path)
    assert ld.load_model(path, force_variant=True).config.enc_scale == 3
    path = saved(tmp_path / "shapes_s3ex3.pth", official)
    assert f"is 2 by the variant '{H2}', 3 by the file's name 'shapes_s3ex3.pth'" in refusal(path, H2)
    assert ld.load_model(path, H3).config.name == H3


@pytest.mark.parametrize(
    "arguments, says",
    [
        (
            {"num_expansion": 1},
            "num_expansion (how many encoder layers update all levels) is 3 by the weights, 1 by the",
        ),
        ({"num_queries": 900}, "num_queries is 64 by the weights, 900 by the checkpoint's training arguments"),
        ({"hidden_dim": 256}, "hidden_dim is 128 by the weights, 256 by the checkpoint's training arguments"),
        ({"dec_layers": 6}, "decoder_layers is 3 by the weights, 6 by the checkpoint's training arguments"),
    ],
)
def test_arguments_against_the_weights(tmp_path, official, arguments, says):
    path = saved(tmp_path / "weights.pth", official, enc_scale=3, **arguments)
    assert says in refusal(path)
    assert says in refusal(path, force_variant=True)  # weights cannot be talked into another shape


def test_overrides_win_silently(tmp_path, official):
    path = saved(tmp_path / "weights_s3.pth", official, enc_scale=3, nheads="many")
    model = ld.load_model(path, H3, enc_scale=2, num_heads=8)
    assert (model.config.enc_scale, model.config.num_heads, model.forced_variant) == (2, 8, None)
    assert model.config.encoder_points == 2  # the same offsets, of twice as many heads


def test_the_scale_of_a_full_encoder_says_nothing(tmp_path):
    config = parse_variant("dino-r26n")
    state_dict = {
        official_key(key, config): value for key, value in ld.load_model(variant="dino-r26n").state_dict().items()
    }
    path = saved(tmp_path / "dino_s2.pth", state_dict, enc_scale=1)
    assert ld.load_model(path, "dino-r26n").config == config


def test_an_original_model_is_no_lite_one(tmp_path):
    config = parse_variant("dino-r26n")  # without query projections
    state_dict = {
        official_key(key, config): value for key, value in ld.load_model(variant="dino-r26n").state_dict().items()
    }
    assert "is 3 by the variant 'lite-dino-r26n', 6 by the weights, whose" in refusal(state_dict, "lite-dino-r26n")


# Keys


@pytest.mark.parametrize("variant", ["lite-dino-r26n", "lite-deformable-detr-r26n", "h-detr-r26n"])
def test_any_missing_key_is_named(variant):
    """Also those that the configuration is read from."""
    model = ld.load_model(variant=variant)
    config = model.config
    state_dict = {official_key(key, config): value for key, value in model.state_dict().items()}
    fields = {"enc_scale": config.enc_scale, "num_expansion": config.num_expansion, "num_queries": config.num_queries}
    # Without the queries H-DETR is Deformable DETR.
    keys = {*list(state_dict)[::9], *(key for key in READ if key in state_dict)} - {"query_embed.weight"}
    assert len(keys) > 30
    for key in keys:
        message = refusal({k: v for k, v in state_dict.items() if k != key}, **fields)
        assert f"missing: {key}. " in message and "another architecture" not in message, message


def test_our_own_keys_load(tmp_path):
    torch.manual_seed(1)
    model = ld.load_model(variant=H2)
    torch.save({"model": model.state_dict()}, tmp_path / "ours.pth")
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    for path in (tmp_path / "ours.pth", tmp_path / "plain.pth"):
        loaded = ld.load_model(path, H2)
        assert loaded.config == model.config
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert "cannot tell how many of its levels" in refusal(tmp_path / "ours.pth")
    missing = {key: value for key, value in model.state_dict().items() if key != "level_embed"}
    assert "missing: level_embed. " in refusal(missing, H2)


def test_own_queries_are_kept():
    model = ld.load_model(variant="h-detr-r26n", num_queries=80)
    assert ld.load_model(model.state_dict(), "h-detr-r26n").config.num_queries == 80


def test_another_architecture_is_called_so():
    detr = {f"transformer.{part}.layers.0.linear1.weight": torch.zeros(8, 8) for part in ("encoder", "decoder")}
    message = refusal(detr | {"class_embed.weight": torch.zeros(92, 8), "query_embed.weight": torch.zeros(100, 8)})
    assert "another architecture" in message and "lacks transformer.enc_output" in message
    yolo = refusal({"model.0.conv.weight": torch.zeros(8, 3, 3, 3)})
    assert "another architecture" in yolo and "model.0.conv.weight" in yolo


def test_keys_with_control_characters_are_escaped(official):
    message = refusal(official | {"evil\n\x1b[31m": torch.zeros(1)}, H3)
    assert r"unexpected: evil\n\x1b[31m" in message and len(message.splitlines()) == 1


# Tensors


@pytest.mark.parametrize("shape", [(), (3,), (0,), (0, 128), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("key", READ)
def test_misshapen_tensors_are_named(official, key, shape):
    message = refusal(official | {key: torch.zeros(shape)}, H3)
    assert f"misshapen: {key} is {list(shape)}, must be [" in message


def test_every_tensor_a_scalar(official):
    message = refusal({key: torch.zeros(()) for key in official}, H3)
    assert "fits no detector" in message and "0; it must be a whole number from" in message


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
)
def test_tensors_of_other_types_are_refused(official, dtype):
    key = "transformer.encoder.layers.0.linear1.weight"
    message = refusal(official | {key: official[key].to(dtype)}, H3)
    assert f"{key} ({dtype})" in message and "not supported" in message and "INT8 is made by the export" in message


def test_quantized_sparse_and_absent_numbers_are_refused(official):
    key = "class_embed.0.weight"
    quantized = torch.quantize_per_tensor(official[key], 0.1, 0, torch.qint8)
    for value in (quantized, official[key].to_sparse(), torch.empty_like(official[key], device="meta")):
        assert key in refusal(official | {key: value}, H3)


def test_types_of_floating_point_are_taken(official, shipped):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = ld.load_model({key: value.to(dtype) for key, value in official.items()}, H3)
        assert all(value.dtype == torch.float32 for value in model.state_dict().values())


def test_nan_is_no_difference_between_copies(official):
    """A weight that is NaN is for verification to find; its copies under other keys are equal."""
    value = official["class_embed.0.bias"].clone()
    value[3] = torch.nan
    model = ld.load_model(official | {f"class_embed.{layer}.bias": value.clone() for layer in range(3)}, H3)
    assert model.class_embed.bias.isnan().sum() == 1


# Training arguments


@pytest.mark.parametrize("value", [0, -4, "8", 4.0, True, [4], {"a": 1}])
def test_heads_that_are_no_number(tmp_path, official, value):
    message = refusal(saved(tmp_path / "weights.pth", official, enc_scale=3, nheads=value))
    assert f"nheads = {value!r}; it must be a whole number from 1" in message


@pytest.mark.parametrize("heads", [3, 64, 10**12])
def test_heads_that_do_not_divide(tmp_path, official, heads):
    assert f"num_heads is {heads}; it must be" in refusal(
        saved(tmp_path / "weights.pth", official, enc_scale=3, nheads=heads)
    )


@pytest.mark.parametrize("value", [7, "disc", ["disc"], list(range(10)), {0: "disc"}, [["deep"]] * 10])
def test_class_names_that_do_not_fit(tmp_path, official, value):
    message = refusal(saved(tmp_path / "weights.pth", official, enc_scale=3, class_names=value))
    assert "class_names is " in message and "a list of 10 names" in message


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "{", "[1]", "7"]
)
def test_metadata_that_is_no_object(tmp_path, official, text):
    path = tmp_path / "weights.safetensors"
    save_file(official, path, {METADATA_KEY: text})
    message = refusal(path)
    assert f"metadata 'litedetr' of checkpoint '{path}' is not a JSON object" in message and len(message) < 600


# Files


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", ["zip", "legacy", *range(pickle.HIGHEST_PROTOCOL + 1)])
def test_code_in_pickles_is_not_run(tmp_path, form):
    proof, path = tmp_path / "proof", tmp_path / "weights.pth"
    contents = {"model": {"weight": torch.zeros(3)}, "optimizer": Payload(proof)}
    if isinstance(form, int):
        path.write_bytes(pickle.dumps(contents, protocol=form))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert not proof.exists()
    assert f"checkpoint '{path}' holds Python code or objects" in message and "none of it was run" in message
    assert "download" not in message
    if form in ("zip", "legacy"):
        assert f"{os.system.__module__}.system" in message
    # The payload is a real one.
    pickle.loads(pickle.dumps(Payload(proof)))
    assert proof.exists()


def test_code_in_a_tar_is_not_run(tmp_path):
    """PyTorch before 0.1.10 wrote such files."""
    proof, path = tmp_path / "proof", tmp_path / "weights.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            (tmp_path / name).write_bytes(pickle.dumps(Payload(proof), protocol=2))
            archive.add(tmp_path / name, name)
    assert "none of it was run" in refusal(path)
    assert not proof.exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(tmp_path, official, form):
    path = tmp_path / "weights.pth"
    if form == "safetensors":
        save_file(official, path)  # the suffix is wrong, and does not matter
    else:
        torch.save({"model": official}, path, _use_new_zipfile_serialization=form == "zip")
    assert ld.load_model(path, H3).config.name == H3
    for size in (path.stat().st_size - 1, 40_000, 100, 9, 8, 4, 0):
        os.truncate(path, size)
        message = refusal(path, H3)
        assert re.search("not a (PyTorch checkpoint|readable safetensors file).*copy it again", message), message


def test_a_wrong_suffix(tmp_path, official):
    path = tmp_path / "weights.safetensors"
    torch.save({"model": official}, path)
    assert "give it the suffix .pth" in refusal(path)
    os.truncate(path, 0)
    assert "not a readable safetensors file" in refusal(path)


def test_what_is_no_file(tmp_path):
    assert "is a directory" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "weights.pth")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    assert "deployed model and no checkpoint" in refusal(tmp_path / "model.onnx")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path, official):
    path = saved(tmp_path / "weights.pth", official)
    path.chmod(0)
    assert "permission denied" in refusal(path)


def test_control_characters_of_a_name_are_escaped(tmp_path):
    path = tmp_path / "weights\n\x1b[31m.pth"
    path.write_text("nothing")
    message = refusal(path)
    assert r"weights\n\x1b[31m.pth" in message and len(message.splitlines()) == 1


# Written by us


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize(
    "variant, overrides",
    [
        (H2, {"num_heads": 8, "encoder_points": 2, "decoder_points": 2}),
        ("lite-dino-r26n", {"key_aware": False, "small_expand": False, "num_queries": 30}),
        ("lite-dino-r26n-h3l1-6+1x1", {"proj_key": True, "same_loc": True}),
        ("dino-r26n", {"num_classes": 3}),
        ("lite-deformable-detr-r26n", {"num_queries": 17}),
        ("lite-h-detr-r26n-h2l2-2+1x3", {"num_queries": 420}),
        ("lite-dino-swin-t", {"hidden_dim": 64, "num_heads": 2, "dim_feedforward": 64, "decoder_dim_feedforward": 64}),
    ],
)
def test_a_saved_model_is_the_same(tmp_path, variant, overrides, suffix):
    model = ld.load_model(variant=variant, **overrides)
    model.class_names = tuple(f"class {i}" for i in range(model.config.num_classes))
    path = tmp_path / f"model{suffix}"
    ld.save_checkpoint(model, path)
    loaded = ld.load_model(path)
    assert dataclasses.asdict(loaded.config) == dataclasses.asdict(model.config)
    assert loaded.class_names == model.class_names and loaded.forced_variant is None
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    contents = torch.load(path, weights_only=True) if suffix != ".safetensors" else None
    if contents:
        assert set(contents["model"]) == {official_key(key, model.config) for key in before}


def test_saving_is_complete_or_not_at_all(tmp_path, shipped, monkeypatch):
    path = tmp_path / "model.pth"
    ld.save_checkpoint(shipped, path)
    whole = path.read_bytes()

    def fail(contents, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="No space"):
            ld.save_checkpoint(shipped, path)
    assert path.read_bytes() == whole and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ld.LiteDetrError, match="must have a name that ends in .pth"):
        ld.save_checkpoint(shipped, tmp_path / "model.onnx")
    with pytest.raises(ld.LiteDetrError, match="cannot be written"):
        ld.save_checkpoint(shipped, tmp_path / "missing" / "model.pth")


def test_a_file_can_be_saved_over_itself(tmp_path, shipped):
    path = tmp_path / "model.pth"
    ld.save_checkpoint(shipped, path)
    ld.save_checkpoint(ld.load_model(path), path)
    assert torch.equal(ld.load_model(path).level_embed, shipped.level_embed)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_parts_of_one_memory_are_saved_alone(tmp_path, official, shipped, suffix):
    memory = torch.cat([value.flatten() for value in official.values()])
    parts = memory.split([value.numel() for value in official.values()])
    views = {key: part.view(value.shape) for (key, value), part in zip(official.items(), parts)}
    views["transformer.enc_output.weight"] = official["transformer.enc_output.weight"].t().contiguous().t()
    path = tmp_path / f"model{suffix}"
    ld.save_checkpoint(ld.load_model(views, H3), path)
    assert path.stat().st_size < 1.1 * memory.nbytes
    loaded = ld.load_model(path).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in shipped.state_dict().items())


def test_metadata_of_a_saved_file(tmp_path, shipped):
    from safetensors import safe_open

    ld.save_checkpoint(shipped, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        arguments = json.loads(file.metadata()[METADATA_KEY])
    assert arguments["nheads"] == 4 and arguments["class_names"] == list(shipped.class_names)


# The configuration


@pytest.mark.parametrize(
    "field, value",
    [
        (field.name, value)
        for field in dataclasses.fields(DetectorConfig)
        if isinstance(field.default, int) and not isinstance(field.default, bool)
        for value in (0, -1, 10**12, 2.0, "4", None, True)
    ],
)
def test_numbers_of_a_configuration(field, value):
    with pytest.raises(ld.LiteDetrError, match=re.escape(f"{field} is {value!r}; it must be a whole number from ")):
        DetectorConfig(**{field: value})


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"num_heads": 3}, "num_heads is 3; it must be such that hidden_dim 256 / num_heads is a multiple of 4"),
        ({"hidden_dim": 48, "num_heads": 4}, "hidden_dim is 48; it must be a multiple of 32"),
        ({"enc_scale": 4}, "enc_scale is 4; it must be from 1 to 3"),
        ({"num_expansion": 4}, "num_expansion is 4; it must be a divisor of the 6 encoder layers"),
        ({"key_aware": 1}, "key_aware is 1; it must be True or False"),
        ({"family": "yolo"}, "family is 'yolo'; it must be one of dino"),
        ({"family": None}, "family is None; it must be one of dino"),
        ({"backbone": ["r50"]}, "backbone is ['r50']; it must be one of r50"),
    ],
)
def test_configurations_that_do_not_fit(fields, says):
    with pytest.raises(ld.LiteDetrError, match=re.escape(says)):
        DetectorConfig(**fields)


def test_unknown_fields_are_named():
    with pytest.raises(ld.LiteDetrError, match="unknown configuration field num_haeds"):
        ld.load_model(SHIPPED, num_haeds=4)
    with pytest.raises(ld.LiteDetrError, match="unknown configuration field num_haeds"):
        ld.load_model(variant=H3, num_haeds=4)


@pytest.mark.parametrize("is_dino", [True, False])
@pytest.mark.parametrize("has_body", [True, False])
def test_rules_are_inverse(is_dino, has_body):
    """Every key of ours comes back from the official one."""
    from litedetr_deploy.model.checkpoints.official import theirs, translate

    config = parse_variant("lite-dino-swin-t" if is_dino else "lite-h-detr-r50")
    with torch.device("meta"):
        from litedetr_deploy.model.detector import Detector

        keys = list(Detector(config).state_dict())
    both = rules(is_dino, config.decoder_layers, has_body)
    assert [translate(theirs(key, both), both) for key in keys] == keys
    assert len({theirs(key, both) for key in keys}) == len(keys)
