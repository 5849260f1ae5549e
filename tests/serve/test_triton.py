"""litedetr serve triton: what is written, as Triton's own protocol buffers read it, field by field; what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from litedetr_deploy.artifact import NOT_VERIFIED, sha256
from litedetr_deploy.cli import main
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.files import tomllib
from litedetr_deploy.ops import native
from litedetr_deploy.runtime.tensorrt import read_record
from litedetr_deploy.serve import triton
from litedetr_deploy.serve.triton import write_repository

from ..runtime.tiny_artifact import METADATA, NAMES, save_detector, save_raw_detector, save_with_attention_op, seal

pb = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="tritonclient is not installed")
REPOSITORY = Path(__file__).parents[2]


def config(repository, name):
    from google.protobuf import text_format

    return text_format.Parse((repository / name / "config.pbtxt").read_text("utf-8"), pb.ModelConfig())


def tensors(values):
    return {value.name: (pb.DataType.Name(value.data_type), list(value.dims)) for value in values}


INPUTS = {"images": ("TYPE_FP32", [3, 64, 96]), "orig_target_sizes": ("TYPE_INT64", [2])}
OUTPUTS = {"labels": ("TYPE_INT64", [3]), "boxes": ("TYPE_FP32", [3, 4]), "scores": ("TYPE_FP32", [3])}


@pytest.fixture
def model(tmp_path):
    return save_detector(tmp_path / "model.onnx")


def with_attention_op(path):
    """A detector with one of our nodes in it, which nothing need run."""
    save_detector(path, attention="op")
    proto = onnx.load(path)
    node = onnx.helper.make_node("KeyAwareDeformAttn", ["scale"], ["unused"], domain="litedetr")
    proto.graph.node.append(node)
    seal(proto, path, METADATA | {"attention": "op"})
    return path


def save_engine(path, batch=(1, 2, 4), sizes=((64, 96),) * 3, attention="op", **record):
    """An engine's file, which nothing runs here, with a report such as `litedetr build` writes."""
    path.write_bytes(b"ftrt" + bytes(100))
    sides = [-1 if len({size[i] for size in sizes}) > 1 else sizes[0][i] for i in (0, 1)]
    report = {
        "backend": "tensorrt", "sha256": sha256(path), "metadata": METADATA | {"attention": attention},
        "options": {"version_compatible": False}, "plugin_inside": False,
        "shapes": {
            "images": [[n, 3, *size] for n, size in zip(batch, sizes)], "orig_target_sizes": [[n, 2] for n in batch],
        },
        "tensors": {
            "images": {"type": "FLOAT", "shape": [-1, 3, *sides]},
            "orig_target_sizes": {"type": "INT64", "shape": [-1, 2]},
            "labels": {"type": "INT64", "shape": [-1, 300]},
            "boxes": {"type": "FLOAT", "shape": [-1, 300, 4]},
            "scores": {"type": "FLOAT", "shape": [-1, 300]},
        },
    } | record  # fmt: skip
    path.with_name(f"{path.name}.json").write_text(json.dumps(report))
    return path


def test_python(model, tmp_path):
    report = write_repository(model, tmp_path / "repo", instances=2, max_batch_size=5)
    assert report.models == ["model", "model_preprocess", "model_jpeg"] and report.max_batch_size == 5
    found = config(tmp_path / "repo", "model")
    assert (found.name, found.backend, found.max_batch_size) == ("model", "python", 5)
    assert tensors(found.input) == INPUTS and tensors(found.output) == OUTPUTS
    assert {one.name: one.label_filename for one in found.output if one.label_filename} == {"labels": "labels.txt"}
    [group] = found.instance_group
    assert (group.count, group.kind) == (2, pb.ModelInstanceGroup.KIND_CPU)
    assert found.HasField("dynamic_batching") and found.version_policy.latest.num_versions == 1
    [warmup] = found.model_warmup
    assert warmup.batch_size == 1 and {name: list(one.dims) for name, one in warmup.inputs.items()} == {
        "images": [3, 64, 96],
        "orig_target_sizes": [2],
    }
    assert not found.HasField("model_operations")
    assert (tmp_path / "repo" / "model" / "labels.txt").read_text().splitlines() == NAMES
    version = tmp_path / "repo" / "model" / "1"
    assert (version / "model.onnx").read_bytes() == model.read_bytes()
    assert not list(version.glob("*.so"))  # a model of standard ops
    assert report.size_bytes == sum(file.stat().st_size for file in (tmp_path / "repo").rglob("*") if file.is_file())


def test_jpeg(model, tmp_path):
    write_repository(model, tmp_path / "repo", name="detector")
    prepares, whole = (config(tmp_path / "repo", f"detector_{end}") for end in ("preprocess", "jpeg"))
    assert prepares.backend == "python" and whole.platform == "ensemble"
    for one in (prepares, whole):
        assert one.max_batch_size == 8 and tensors(one.input) == {"image": ("TYPE_STRING", [1])}
    assert tensors(prepares.output) == INPUTS and tensors(whole.output) == OUTPUTS
    assert prepares.parameters["resize"].string_value == "stretch"
    assert json.loads(prepares.parameters["image_size"].string_value) == [64, 96]
    first, second = whole.ensemble_scheduling.step
    assert (first.model_name, second.model_name) == ("detector_preprocess", "detector")
    assert dict(first.input_map) == {"image": "image"} and first.model_version == second.model_version == -1
    assert dict(first.output_map) == dict(second.input_map) == {name: name for name in INPUTS}
    assert dict(second.output_map) == {name: name for name in OUTPUTS}


@pytest.mark.parametrize(
    "size, mask, resize", [(None, False, "shortest_edge"), (None, True, "shortest_edge"), ((64, 96), True, "letterbox")]
)
def test_sizes_and_masks(tmp_path, size, mask, resize):
    model = save_detector(tmp_path / "model.onnx", size, mask)
    write_repository(model, tmp_path / "repo")
    found, prepares = config(tmp_path / "repo", "model"), config(tmp_path / "repo", "model_preprocess")
    sides = list(size or (-1, -1))
    assert tensors(found.input) == tensors(prepares.output)
    assert tensors(found.input)["images"] == ("TYPE_FP32", [3, *sides])
    assert tensors(found.input).get("pixel_mask", ("TYPE_BOOL", sides)) == ("TYPE_BOOL", sides)
    assert ("pixel_mask" in tensors(found.input)) == mask
    assert prepares.parameters["resize"].string_value == resize
    assert list(found.model_warmup[0].inputs["images"].dims) == [3, *(size or (800, 1333))]


def test_onnxruntime_finds_the_op_library_by_its_absolute_path(tmp_path):
    model = with_attention_op(tmp_path / "model.onnx")
    report = write_repository(model, tmp_path / "repo", backend="onnxruntime", device="gpu")
    found = config(tmp_path / "repo", "model")
    assert found.backend == "onnxruntime" and found.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    [library] = found.model_operations.op_library_filename
    assert report.op_library == library and os.path.isabs(library) and not found.parameters
    assert Path(library).read_bytes() == native.library("onnxruntime").read_bytes()
    assert [one.batch_size for one in found.model_warmup] == [1, 8]
    assert not (tmp_path / "repo" / "model" / "1" / "model.py").exists()
    given = "/models/model/ops.so"
    write_repository(model, tmp_path / "other", backend="onnxruntime", op_library=given)
    assert list(config(tmp_path / "other", "model").model_operations.op_library_filename) == [given]


def test_a_model_of_standard_ops_needs_no_library(model, tmp_path):
    report = write_repository(model, tmp_path / "repo", backend="onnxruntime")
    assert not config(tmp_path / "repo", "model").HasField("model_operations") and report.op_library is None


def started(repository, *options):
    """What start.sh passes to the server."""
    done = subprocess.run(
        ["sh", repository / "start.sh", *options], env=os.environ | {"TRITONSERVER": "echo"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_tensorrt(tmp_path):
    plan = save_engine(tmp_path / "model.plan")
    report = write_repository(plan, tmp_path / "repo")
    found = config(tmp_path / "repo", "model")
    assert (found.backend, found.max_batch_size) == ("tensorrt", 4)
    assert tensors(found.input) == INPUTS
    assert tensors(found.output)["boxes"] == ("TYPE_FP32", [300, 4])
    assert found.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert [one.batch_size for one in found.model_warmup] == [1, 4]
    assert read_record(tmp_path / "repo" / "model" / "1" / "model.plan") == read_record(plan)
    library = tmp_path / "repo" / "model" / native.LIBRARIES["tensorrt-register"]
    assert library.is_file() and library.with_name(native.LIBRARIES["tensorrt"]).is_file()
    flag = f"--backend-config=tensorrt,plugins={library}"
    assert report.command == ["tritonserver", f"--model-repository={tmp_path / 'repo'}", flag]
    assert started(tmp_path / "repo", "--http-port=1") == [*report.command[1:], "--http-port=1"]


def test_tensorrt_with_the_plugin_inside(tmp_path):
    plan = save_engine(
        tmp_path / "model.plan", plugin_inside=True, options={"version_compatible": True},
        sizes=((64, 96), (64, 96), (128, 96)),
    )  # fmt: skip
    report = write_repository(plan, tmp_path / "repo", max_batch_size=1)
    found = config(tmp_path / "repo", "model")
    assert report.command[2:] == ["--backend-config=tensorrt,version-compatible=true"]
    assert not list((tmp_path / "repo").rglob("*.so"))
    assert tensors(found.input)["images"] == ("TYPE_FP32", [3, -1, 96]) and not found.HasField("dynamic_batching")
    assert list(found.model_warmup[0].inputs["images"].dims) == [3, 64, 96]  # the best of the profile


def test_external_weights_go_along(model, tmp_path):
    proto = onnx.load(model)
    (tmp_path / "big").mkdir()
    path = tmp_path / "big" / "model.onnx"
    onnx.external_data_helper.convert_model_to_external_data(proto, location="data.bin", size_threshold=0)
    onnx.save(proto, path)
    write_repository(path, tmp_path / "repo", allow_unverified=True)  # it was rewritten
    copied = tmp_path / "repo" / "model" / "1"
    assert (copied / "data.bin").read_bytes() == (tmp_path / "big" / "data.bin").read_bytes()


def test_raw_outputs_get_no_jpeg_model(tmp_path):
    logits = np.zeros((5, 4), np.float32)
    model = save_raw_detector(tmp_path / "model.onnx", logits, np.zeros((5, 4), np.float32), class_names=None)
    report = write_repository(model, tmp_path / "repo")
    found = config(tmp_path / "repo", "model")
    assert report.models == ["model"] and tensors(found.output)["pred_logits"] == ("TYPE_FP32", [5, 4])
    assert not (tmp_path / "repo" / "model" / "labels.txt").exists()


def test_a_fixed_batch(model, tmp_path):
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(proto, model)
    write_repository(model, tmp_path / "repo", allow_unverified=True)
    found = config(tmp_path / "repo", "model")
    assert found.max_batch_size == 0 and tensors(found.input)["images"] == ("TYPE_FP32", [1, 3, 64, 96])
    assert not found.HasField("dynamic_batching") and [one.batch_size for one in found.model_warmup] == [0]
    with pytest.raises(LiteDetrError, match=r"'images' of .* has the fixed shape \[1, 3, 64, 96\]"):
        write_repository(model, tmp_path / "other", max_batch_size=2, allow_unverified=True)


def test_the_copied_modules_need_what_requirements_say(tmp_path):
    model = with_attention_op(tmp_path / "model.onnx")
    report = write_repository(model, tmp_path / "repo")
    assert (tmp_path / "repo" / "requirements.txt").read_text().splitlines() == report.requirements
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = set(sys.modules);"
        # An editable installation of this package would come first.
        "sys.meta_path = [one for one in sys.meta_path if 'Redirecting' not in type(one).__name__];"
        "import onnxruntime, litedetr_deploy.runtime.session, litedetr_deploy.runtime.images;"
        "print(litedetr_deploy.__file__, *(set(sys.modules) - before))"
    )
    version = tmp_path / "repo" / "model" / "1"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", code, version], capture_output=True, text=True, env=environment)
    file, *modules = done.stdout.split()
    assert file.startswith(str(version)), done.stderr
    third_party = {name.split(".")[0] for name in modules} - set(sys.stdlib_module_names)
    assert third_party & {"rich", "typer", "torch", "onnx", "google"} == set()
    assert {"numpy", "PIL", "onnxruntime", "litedetr_deploy"} <= third_party
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = {*project["dependencies"], *project["optional-dependencies"]["onnxruntime"]}
    unlike = {one.replace("'", '"') for one in report.requirements} - {one.replace("'", '"') for one in wanted}
    assert unlike == {"numpy>=1.26,<2"}  # of Triton's own


@pytest.mark.parametrize("name", ["triton_detector.py", "triton_preprocess.py"])
def test_models_import_only_what_is_copied(name):
    lines = Path(triton.__file__).with_name(name).read_text().splitlines()
    rooms = [line.split()[1].split(".")[1] for line in lines if line.startswith("from litedetr_deploy.")]
    assert rooms and {*rooms} <= {room.removesuffix(".py") for room in triton._ROOMS}


def refused(message, *arguments, **options):
    with pytest.raises(LiteDetrError, match=message):
        write_repository(*arguments, **options)


def test_bad_options(model, tmp_path):
    repo, before = tmp_path / "repo", sorted(tmp_path.rglob("*"))
    refused("backend is 'onnx'.*'onnxruntime'", model, repo, backend="onnx")
    refused("takes .plan files, and the model is", model, repo, backend="tensorrt")
    refused("device is 'cuda'", model, repo, device="cuda")
    refused("name is '-x'", model, repo, name="-x")
    refused("name is 'a/b'", model, repo, name="a/b")
    refused("instances is 0", model, repo, instances=0)
    refused("max_batch_size is 0", model, repo, max_batch_size=0)
    refused("has none of our ops", model, repo, backend="onnxruntime", op_library="/a.so")
    refused("does not exist", tmp_path / "gone.onnx", repo)
    refused("is a directory", tmp_path, repo)
    refused("does not exist. Make it first", model, tmp_path / "no" / "repo")
    with_op = with_attention_op(tmp_path / "op.onnx")
    refused("takes an absolute path", with_op, repo, backend="onnxruntime", op_library="a.so")
    refused("which finds its library", with_op, repo, op_library="/a.so")
    with_op.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_exists(model, tmp_path):
    (tmp_path / "repo").mkdir()
    refused("exists, and a repository is not written over", model, tmp_path / "repo")
    assert not list((tmp_path / "repo").iterdir())


def test_what_is_not_verified(tmp_path):
    model = save_detector(tmp_path / "model.onnx", verification={"verdict": NOT_VERIFIED})
    refused("was not verified, so it is not served.*--allow-unverified", model, tmp_path / "repo")
    report = write_repository(model, tmp_path / "repo", allow_unverified=True)
    assert report.warnings == [f"{model} was not verified: its results are not proven"]
    rewritten = save_detector(tmp_path / "rewritten.onnx")
    proto = onnx.load(rewritten)
    proto.graph.doc_string = "changed"
    onnx.save(proto, rewritten)
    refused("was rewritten after it was verified", rewritten, tmp_path / "other")


def test_an_op_of_another_version(tmp_path):
    refused(
        "version 7 of the attention ops",
        save_with_attention_op(tmp_path / "model.onnx", op_version=7),
        tmp_path / "repo",
    )


def test_engines_that_triton_cannot_serve(tmp_path):
    plan, repo = tmp_path / "model.plan", tmp_path / "repo"
    record = save_engine(plan).with_name("model.plan.json")
    refused("on GPUs", plan, repo, device="cpu")
    refused("takes .onnx files", plan, repo, backend="python")
    refused("takes batches of up to 4", plan, repo, max_batch_size=5)
    report = json.loads(record.read_text())
    refused("takes batches of 2 to 4", save_engine(plan, batch=(2, 2, 4)), repo)
    refused("tensorrt-rtx, for which Triton has no back end", save_engine(plan, backend="tensorrt-rtx"), repo)
    record.write_text(json.dumps({key: value for key, value in report.items() if key != "tensors"}))
    refused("does not say the inputs and outputs", plan, repo)
    record.unlink()
    refused("has no model.plan.json beside it", plan, repo)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.plan"]


def test_a_missing_library_leaves_nothing(tmp_path, monkeypatch):
    def library(name):
        raise FileNotFoundError("it is not there")

    model = with_attention_op(tmp_path / "model.onnx")
    monkeypatch.setattr(native, "library", library)
    for backend in ("python", "onnxruntime"):
        refused("their library is missing: it is not there", model, tmp_path / "repo", backend=backend)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_interrupted(model, tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(triton, "_write_jpeg", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_repository(model, tmp_path / "repo")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code or 0


def test_command(model, tmp_path, capsys):
    assert run("serve", "triton", model, "-o", tmp_path / "repo") == 0
    out, _ = capsys.readouterr()
    assert f"start a server: tritonserver --model-repository={tmp_path / 'repo'}" in out
    assert f"{tmp_path / 'repo'}: 0." in out and "model, model_preprocess, model_jpeg: back end python" in out
    assert run("serve", "triton", model, "-o", tmp_path / "repo") == 2
    assert "is not written over" in capsys.readouterr().err
    assert run("serve", "triton", model, "-o", tmp_path / "other", "--json") == 0
    assert json.loads(capsys.readouterr().out)["models"][0] == "model"


def container(repository, **variables):
    script = REPOSITORY / "export" / "triton.sh"
    return subprocess.run([script, repository], env=os.environ | variables, capture_output=True, text=True)


def test_the_container_script(model, tmp_path):
    import socket

    write_repository(model, tmp_path / "repo")
    with socket.socket() as one:
        one.bind(("", 0))
        one.listen()
        taken = str(one.getsockname()[1])
        done = container(tmp_path / "repo", DRY_RUN="1", HTTP_PORT=taken)
        assert done.returncode == 2 and f"port {taken} cannot be used" in done.stderr and not done.stdout
    ports = {"HTTP_PORT": taken, "GRPC_PORT": "0", "METRICS_PORT": "0"}
    done = container(tmp_path / "repo", DRY_RUN="1", **ports)
    assert done.returncode == 0, done.stderr
    assert f"-v {tmp_path / 'repo'}:{tmp_path / 'repo'}:ro" in done.stdout and "--gpus" not in done.stdout
    write_repository(model, tmp_path / "gpu", device="gpu")
    assert "--gpus=all" in container(tmp_path / "gpu", DRY_RUN="1", **ports).stdout
    done = container(tmp_path)
    assert done.returncode == 2 and "is not a repository" in done.stderr
