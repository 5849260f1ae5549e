"""Build a whole Lite-DINO R50, with random weights, for RTX GPUs in every precision; this needs no GPU.

    python tools/build_rtx.py [FOLDER]

TensorRT-RTX parses and builds the graph of each precision and image size; what it read and made is printed, and engines
are left in FOLDER (build/rtx).  A precision that the engine's network has lost is an error.  Takes about ten minutes.
"""

import sys
import time
from pathlib import Path

import litedetr_deploy as ld
from litedetr_deploy.export.limits import PRECISIONS, Int8
from litedetr_deploy.verify.probes import drawn_image

VARIANT = "lite-dino-r50-h3l1-2+1x3"
IMAGE_SIZES = ((800, 1333), (640, 640))
COMPUTE_CAPABILITY = "8.6"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = ld.load_model(variant=VARIANT)
    print(f"{VARIANT} for compute capability {COMPUTE_CAPABILITY}")
    print(f"{'image size':>10} {'precision':>9} {'ONNX MB':>8} {'engine MB':>9} {'layers':>24} {'seconds':>8}")
    for height, width in IMAGE_SIZES:
        for precision in PRECISIONS:
            began = time.monotonic()
            onnx, plan = (folder / f"{height}x{width}-{precision}{suffix}" for suffix in (".onnx", ".plan"))
            int8 = Int8([drawn_image()], method="minmax") if precision == "int8" else None
            # Not verified: random weights of this depth say little about rounding, and the tests verify small ones.
            ld.export_onnx(model, onnx, "gather", precision, (height, width), int8=int8, verify=False)
            report = ld.build_engine(
                onnx,
                plan,
                backend="tensorrt-rtx",
                batch=(1, 1, 4),
                compute_capabilities=(COMPUTE_CAPABILITY,),
                allow_unverified=True,
            )
            layers = ", ".join(f"{count} {name}" for name, count in report.network_types.items() if count) or "all FP32"
            print(
                f"{f'{height}x{width}':>10} {precision:>9} {onnx.stat().st_size / 1e6:8.1f} "
                f"{report.size_bytes / 1e6:9.1f} {layers:>24} {time.monotonic() - began:8.0f}",
                flush=True,
            )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/rtx"))
