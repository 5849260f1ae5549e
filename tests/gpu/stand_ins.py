"""What `tools/gpu_check.py --dry-run` runs in place of the tools that build for a GPU, and of the GPU.

    python stand_ins.py nvidia-smi|cmake|nvcc|compute-sanitizer|benchmark ARGUMENT ...

Each takes the arguments of what it stands for and refuses others.  'benchmark' is the real one, with tiny maps, every
contender in PyTorch on the CPU, and a made-up device.
"""

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

TARGETS = {
    "litedetr_kda": "plugins/kda/liblitedetr_kda.so",
    "kda_cuda_test": "plugins/tests/kda_cuda_test",
    "tensorrt_harness": "plugins/tests/tensorrt_harness",
}
MAPS = ((8, 12), (4, 6), (2, 3), (1, 2))


def nvidia_smi(arguments: list[str]) -> None:
    assert arguments in ([], ["--query-gpu=name,compute_cap", "--format=csv,noheader"]), arguments
    print("stand-in for a GPU, 9.0")


def nvcc(arguments: list[str]) -> None:
    assert arguments == ["--version"], arguments
    print("stand-in for nvcc")


def cmake(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for option in ("-S", "-B", "--build"):
        parser.add_argument(option, type=Path)
    parser.add_argument("-D", action="append")
    parser.add_argument("--parallel", type=int)
    parser.add_argument("--target", nargs="+", choices=TARGETS)
    options = parser.parse_args(arguments)
    if options.build is None:
        assert (options.S / "CMakeLists.txt").is_file() and options.D, arguments
        options.B.mkdir(parents=True, exist_ok=True)
        print("stand-in: configured", options.B)
        return
    for target in options.target:
        made = options.build / TARGETS[target]
        made.parent.mkdir(parents=True, exist_ok=True)
        made.write_text(f"#!{sys.executable}\nprint('stand-in for {target}: nothing was checked')\n")
        made.chmod(0o755)
        print("stand-in: made", made)


def compute_sanitizer(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tool", required=True, choices=("memcheck", "racecheck", "initcheck"))
    for option in ("--error-exitcode", "--launch-count"):
        parser.add_argument(option, type=int)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    program = parser.parse_args(arguments).program
    os.execv(program[0], program)


def benchmark(arguments: list[str]) -> None:
    import torch

    from litedetr_deploy.benchmark import kernels, timing
    from litedetr_deploy.ops import reference

    class Problem(kernels.Problem):
        def __init__(self, size, device):
            super().__init__(size, "cpu")
            self.device = device  # which decides how calls are timed

    def rival(name, official, answer):
        plain = answer == "plain"
        attend = reference.ms_deform_attn if plain else reference.key_aware_deform_attn
        make = kernels.official_call if official else partial(kernels.torch_call, attend, plain=plain)
        return kernels.Rival(name, make, answer=answer)

    kernels.Problem = Problem
    kernels.SIZES = {name: replace(size, maps=MAPS, boxes=size.boxes // 100) for name, size in kernels.SIZES.items()}
    kernels.RIVALS["cuda"] = tuple(rival(r.name, r.answer == "pytorch", r.answer) for r in kernels.RIVALS["cuda"])
    kernels.deformable_detr = lambda checkout: [rival(kernels.DEFORMABLE_DETR, False, "plain")]
    kernels.native.load_core = lambda: argparse.Namespace(kda_cpu_isa=lambda: b"stand-in")
    torch.cuda.is_available = lambda: True
    torch.cuda.empty_cache = lambda: None
    timing.captured = lambda call: call
    timing.time_device_call = lambda call, cold=False: timing.time_call(call, warm=False)
    numbers = ("multiprocessors", "memory_gib", "l2_mib", "l2_gigabytes_per_second", "memory_gigabytes_per_second")
    timing.device = lambda: {"name": "stand-in", "capability": "9.0", "cuda": "none", **dict.fromkeys(numbers, 1.0)}
    timing.REST = 0
    torch.set_num_threads(1)
    sys.exit(kernels.main([*arguments, "--seconds", "0"]))


if __name__ == "__main__":
    tool, *rest = sys.argv[1:]
    globals()[tool.replace("-", "_")](rest)
