"""What a detector's weights must be before anything is made of them or compared with them."""

from __future__ import annotations

import torch

from ..errors import CheckFailed, LiteDetrError
from ..model.checkpoints.official import official_key
from ..model.detector import Detector

LISTED = 4  # tensors that a message names


def check_weights(model: Detector) -> None:
    """Raise LiteDetrError for a weight that is not float32, CheckFailed for one that is not finite."""
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise LiteDetrError(
                f"the weight {official_key(name, model.config)} is of type {str(tensor.dtype).removeprefix('torch.')}; "
                "it must be float32. Give the weights as they were trained: what is stored smaller is chosen at the "
                "export, with --precision (precision=)."
            )
    bad = [f"{key} {trouble}" for key, trouble in not_finite(model).items()]
    if bad:
        others = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise CheckFailed(
            f"the checkpoint's own weights are not finite: {', '.join(bad[:LISTED])}{others}. PyTorch computes nothing "
            "useful with them either, and nothing was exported. Take an earlier checkpoint, or repair these tensors."
        )


def not_finite(model: Detector) -> dict[str, str]:
    """Return what is wrong with the weights that hold NaN or an infinity, by their keys in official checkpoints."""
    bad = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            kind, count = "NaN" if tensor.isnan().any() else "an infinity", int((~tensor.isfinite()).sum())
            bad[official_key(name, model.config)] = f"holds {kind} in {count:,} of {tensor.numel():,} values"
    return bad
