"""The one verdict on an artifact; nothing else in this package decides whether outputs agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import numpy as np

from ..artifact import CANNOT_TELL, FAILED, NOT_VERIFIED, VERIFIED

Arrays = Mapping[str, np.ndarray]
_LARGEST_FLOAT = float(np.finfo(np.float32).max)  # stands for a difference that is not finite: JSON has no infinity


@dataclass(frozen=True)
class Row:
    """One quantity that was compared; trouble: what no figure says, such as a NaN."""

    case: str
    quantity: str
    difference: float  # a magnitude
    tolerance: float
    trouble: str = ""

    @property
    def passed(self) -> bool:
        return not self.trouble and self.difference <= self.tolerance

    @property
    def share(self) -> float:
        """The difference as a part of the tolerance; infinite where something else is wrong."""
        if self.trouble:
            return np.inf
        return self.difference / self.tolerance if self.tolerance else np.inf if self.difference else 0.0

    def to_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}

    def __str__(self) -> str:
        differs = f"differs by {self.difference:.1e}, {self.tolerance:.1e} is allowed"
        return f"{self.case}, {self.quantity}: {self.trouble or differs}"


@dataclass
class Verdict:
    """What was compared with what, and the rows of it."""

    against: str = "PyTorch"
    ran: str = "the model"  # what the figures were taken on
    rows: list[Row] = field(default_factory=list)
    undecided: str = ""  # why it cannot tell right from wrong; empty where a negative control failed as it must
    skipped: str = ""  # why nothing was compared

    def add(self, case: str, quantity: str, difference: float, tolerance: float, trouble: str = "") -> None:
        """Add a row.  Raises ValueError for a tolerance that is not finite, which would let anything pass."""
        difference, tolerance = float(difference), float(tolerance)
        if not np.isfinite(tolerance):
            raise ValueError(f"the tolerance of {quantity} ({case}) is {tolerance}; it must be finite")
        if not np.isfinite(difference):
            difference, trouble = _LARGEST_FLOAT, trouble or "the difference is not finite"
        self.rows.append(Row(case, quantity, difference, tolerance, trouble))

    @property
    def status(self) -> str:
        if not all(row.passed for row in self.rows):
            return FAILED
        if not self.rows:
            return NOT_VERIFIED
        return CANNOT_TELL if self.undecided else VERIFIED

    @property
    def passed(self) -> bool:
        return self.status == VERIFIED

    @property
    def worst(self) -> Row | None:
        """The row that is closest to its tolerance, or furthest beyond."""
        return max(self.rows, key=lambda row: row.share, default=None)

    @property
    def why(self) -> str:
        """What to say about a verdict other than VERIFIED."""
        if self.status == FAILED:
            return str(self.worst)
        return self.undecided if self.status == CANNOT_TELL else self.skipped

    def __str__(self) -> str:
        if self.status == VERIFIED:
            worst = f"{self.worst.share:.0%} of its tolerance ({self.worst.case}, {self.worst.quantity})"
            return f"verified against {self.against}; the worst figure is {worst}"
        if self.status == FAILED:
            return f"VERIFICATION FAILED against {self.against}: {self.why}"
        if self.status == CANNOT_TELL:
            return f"CANNOT TELL whether it agrees with {self.against}: {self.why}"
        return "not verified" + (f": {self.skipped}" if self.skipped else "")

    def to_dict(self) -> dict:
        return {**self.summary(), "text": str(self), "rows": [row.to_dict() for row in self.rows]}

    def summary(self) -> dict:
        """Return what a file's metadata says of it, as JSON types."""
        largest: dict[str, float] = {}
        for row in self.rows:
            largest[row.quantity] = max(row.difference, largest.get(row.quantity, 0.0))
        return {
            "verdict": self.status, "passed": self.passed, "against": self.against, "ran": self.ran, "why": self.why,
            "worst": self.worst.to_dict() if self.worst else None, "largest_difference": largest,
        }  # fmt: skip


def largest(difference: np.ndarray) -> float:
    """Return the largest magnitude; NaN counts as infinite, nothing as 0."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0.0))


def mean(difference: np.ndarray) -> float:
    """Return the mean magnitude; NaN counts as infinite, nothing as 0."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).mean()) if np.size(difference) else 0.0


def check_finite(verdict: Verdict, case: str, outputs: Arrays, wanted: Arrays, names: Iterable[str]) -> bool:
    """Return whether all tensors of `names` are finite in `outputs` and in what they should be; add a row of others."""
    finite = True
    for name in names:
        sides = {"the artifact": outputs, verdict.against: wanted}
        tensors = {side: values[name] for side, values in sides.items() if name in values}
        if bad := {side: values for side, values in tensors.items() if not np.isfinite(values).all()}:
            finite = False
            kind = "NaN" if any(np.isnan(values).any() for values in bad.values()) else "an infinity"
            where = f", in {verdict.against} as well" if len(bad) == 2 else f" in {next(iter(bad))} only"
            verdict.add(case, name, np.inf, 0.0, f"holds {kind}{where}")
    return finite


def compare(outputs: Arrays, reference: Arrays, tolerances, verdict=None, case="outputs", distance=largest) -> Verdict:
    """Compare what an artifact computed with what is right, and add the rows to `verdict`, or to a new one.

    tolerances: of the names to compare, how far `distance` of the difference may go.
    """
    verdict = Verdict() if verdict is None else verdict
    if not check_finite(verdict, case, outputs, reference, tolerances):
        return verdict
    for name, tolerance in tolerances.items():
        if outputs[name].shape != reference[name].shape:
            trouble = f"has the shape {list(outputs[name].shape)}, and {list(reference[name].shape)} is right"
            verdict.add(case, name, np.inf, 0.0, trouble)
        else:
            verdict.add(case, name, distance(np.asarray(outputs[name], np.float64) - reference[name]), tolerance)
    return verdict
