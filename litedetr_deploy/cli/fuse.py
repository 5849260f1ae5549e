"""litedetr fuse: anybody's ONNX model to the same with our attention op."""

from pathlib import Path

from ..artifact import check_file
from ..errors import LiteDetrError, printable
from ..export.limits import check_choice
from ..fuse.limits import ATTENTIONS
from . import _checks
from ._console import Stages, escaped, finish, new_table, print_verdict, stdout_console


def fuse(
    model: Path,
    output: Path,
    attention: str = "op",
    inputs: Path | None = None,
    no_verify: bool = False,
    verbose: bool = False,
    as_json: bool = False,
):
    """Replace the deformable attentions of any ONNX model and prove the result equal."""
    check_choice("attention", attention, ATTENTIONS)
    check_file(model, "an ONNX model")
    if output.suffix.lower() != ".onnx":
        raise LiteDetrError(f"The output is {output}; its name must end in .onnx.")
    if output.is_dir():
        raise LiteDetrError(f"The output {output} is a directory. Give the name of a file.")
    _checks.writable_directory(output.parent)
    with Stages() as stage:
        stage("load the tools")
        import litedetr_deploy as ld

        from ..verify.inputs import read

        report = ld.fuse_onnx(model, output, attention, not no_verify, read(inputs), stage).to_dict()
    finish(report, as_json, report["passed"], _print, verbose)


def _print(report, verbose):
    regions, left = report["regions"], report["left"]
    if verbose:
        table = new_table("attention", "taken over", "queries", "levels x points", "heads x channels")
        for region in regions:
            points = "+".join(map(str, region["points"]))
            cells = (
                region["name"],
                region["form"],
                str(region["queries"]),
                points,
                f"{region['heads']}x{region['channels']}",
            )
            table.add_row(*map(escaped, cells))
        stdout_console().print(table)
    for group in left:
        others = f" and {len(group['names']) - 1} more" if len(group["names"]) > 1 else ""
        print(f"left as it is: {printable(group['names'][0])}{others}: {printable(group['why'])}")
    for repair in report["repairs"]:
        print(f"repaired: {printable(repair)}")
    many = "s" if len(regions) > 1 else ""
    how = "the op" if report["metadata"]["attention"] == "op" else "standard ONNX ops"
    size, seconds = f"{report['size_bytes'] / 1e6:.1f} MB", f"{report['seconds']:.0f} s"
    print(f"{printable(report['path'])}: {size}, {len(regions)} deformable attention{many} as {how}, made in {seconds}")
    print_verdict(report["verdict"], verbose)
