"""Times a whole detector on the CPU: our ONNX models against PyTorch, and where the time goes.

    python benchmarks/model.py --image-size 800x1333 --output benchmarks/results/model

Contenders: the exported model with the fused op and with GridSample, in ONNX Runtime; PyTorch with the official form of
the attention (key and value sampled apart by grid_sample).  `encoder` is the sum of ONNX Runtime's own node times over
the encoder's nodes.  Weights are random: times do not depend on them.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import kernels
import numpy as np
import timing
import torch
import typer

import litedetr_deploy as ld
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.ops import torch_op


def official_attention(query, value, reference_points, sampling_offsets, spatial_shapes, num_heads, num_points, key=None):
    """The official PyTorch arithmetic in place of our op."""
    maps = [tuple(shape) for shape in spatial_shapes.tolist()]
    return kernels.attend_official(query, value, reference_points, sampling_offsets, maps)


def main(
    variant: Annotated[str, typer.Option(help="The detector.")] = "lite-dino-r50-h3l1-2+1x3",
    image_size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels.")] = "800x1333",
    rounds: Annotated[int, typer.Option(help="Timed calls of each contender.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Write OUTPUT.json.")] = None,
):
    height, width = map(int, image_size.split("x"))
    model = ld.load_model(variant=variant)
    images = torch.rand(1, 3, height, width)
    feed = {"images": images.numpy(), "orig_target_sizes": np.array([[width, height]])}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {}
        for attention in ("op", "gridsample"):
            path = Path(folder) / f"{attention}.onnx"
            ld.export_onnx(model, path, attention=attention, image_size=(height, width), verify=False)
            sessions[attention] = ld.create_session(path)

        def in_pytorch():
            fused, torch_op.key_aware_deform_attn = torch_op.key_aware_deform_attn, official_attention
            try:
                with torch.inference_mode():
                    model(images)
            finally:
                torch_op.key_aware_deform_attn = fused

        calls = {f"ONNX Runtime, {name}": lambda s=session: s.run(None, feed) for name, session in sessions.items()}
        calls["PyTorch, official form"] = in_pytorch
        for call in calls.values():
            call()
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call()
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        encoder = {name: encoder_seconds(Path(folder) / f"{name}.onnx", feed, rounds) for name in sessions}
    report = {
        "benchmark": "model",
        "variant": variant,
        "image_size": [height, width],
        "threads": torch.get_num_threads(),
        "machine": timing.machine(["torch", "onnxruntime"]),
        "seconds": {name: sorted(times) for name, times in seconds.items()},
        "encoder_seconds": encoder,
    }
    op = np.median(seconds["ONNX Runtime, op"])
    for name, times in seconds.items():
        print(f"{name:28} {np.median(times):7.2f} s  {np.median(times) / op:5.1f} x")
    for name, value in encoder.items():
        print(f"encoder, {name:19} {value:7.2f} s  {value / encoder['op']:5.1f} x")
    if output:
        with replaced_when_done(output.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def encoder_seconds(path: Path, feed: dict, runs: int) -> float:
    """Seconds of the nodes between the first and the last one of the encoder."""
    import onnxruntime

    from litedetr_deploy.runtime.session import register_ops

    options = onnxruntime.SessionOptions()
    register_ops(options)
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(runs + 1):
        session.run(None, feed)
    profile = Path(session.end_profiling())
    events = [e for e in json.loads(profile.read_text()) if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    per_run = len(events) // (runs + 1)
    totals = []
    for run in range(1, runs + 1):
        kinds = events[run * per_run : (run + 1) * per_run]
        last_convolution = max(i for i, e in enumerate(kinds) if e["args"]["op_name"] in ("Conv", "InstanceNormalization"))
        first_selection = min(i for i, e in enumerate(kinds) if e["args"]["op_name"] in ("ReduceMax", "TopK"))
        totals.append(sum(e["dur"] for e in kinds[last_convolution + 1 : first_selection]) * 1e-6)
    return float(np.median(totals))


if __name__ == "__main__":
    typer.run(main)
