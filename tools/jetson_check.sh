#!/usr/bin/env bash
# Check this toolkit on a Jetson with the TensorRT of its JetPack (6 or 7); tools/jetson_check.sh --help says how.
set -uo pipefail

usage() {
    cat <<'TEXT'
usage: tools/jetson_check.sh [--onnx MODEL.onnx] [--checkpoint FILE] [--image-size HEIGHTxWIDTH] [--output FOLDER] [--dry-run]

Builds the TensorRT plugin against the system's headers, exports a model in FP16, builds an engine of it with trtexec and
one with `litedetr build`, verifies that one, and measures its latency and power. Choose the power mode and run
jetson_clocks before. The package must be installed (pip install '.[tensorrt]', and '[export]' to export here).

--onnx        take this model, made on a PC by `litedetr export --recipe export/orin-fp16.toml`, and export none
--checkpoint  the weights, default lite-dino-shapes, which come with the package; with --onnx those that it was made
              from: without them its latency is measured unchecked
--image-size  of the model; default 800x1333
--output      folder of the logs, the engines and the report; default a new one in the temporary directory
--dry-run     print every command and run none
TRTEXEC: the program; trtexec in the PATH or in /usr/src/tensorrt/bin, when not set.
A step that fails does not stop those that do not need it. Exits with 1 where one failed, with 2 for wrong use.
TEXT
}

fail() {
    echo "error: $*; --help says what there is" >&2
    exit 2
}

onnx='' checkpoint='' size=800x1333 output='' dry_run=''
while [ $# -gt 0 ]; do
    case $1 in
    --onnx | --checkpoint | --image-size | --output)
        [ $# -ge 2 ] || fail "$1 needs a value"
        case $1 in
        --onnx) onnx=$2 ;;
        --checkpoint) checkpoint=$2 ;;
        --image-size) size=$2 ;;
        --output) output=$2 ;;
        esac
        shift
        ;;
    --dry-run) dry_run=1 ;;
    --help | -h) usage && exit 0 ;;
    *) fail "there is no option $1" ;;
    esac
    shift
done
[[ $size =~ ^[0-9]+x[0-9]+$ ]] || fail "--image-size is $size; it must be HEIGHTxWIDTH, as in 800x1333"
[ -z "$onnx" ] || [ -n "$dry_run" ] || [ -f "$onnx" ] || fail "--onnx is $onnx, which is no file"
# Commands run in the output folder; a checkpoint can also be a name.
[ -z "$onnx" ] || onnx=$(realpath -m "$onnx")
[ ! -f "$checkpoint" ] || checkpoint=$(realpath "$checkpoint")

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# JetPack leaves both outside the PATH.
PATH=$PATH:/usr/local/cuda/bin
trtexec=${TRTEXEC:-$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)}
if [ -n "$dry_run" ]; then
    output=${output:-${TMPDIR:-/tmp}/litedetr-jetson-check}
else
    if [ -z "$output" ]; then
        output=$(mktemp -d "${TMPDIR:-/tmp}/litedetr-jetson-check-XXXXXX") || exit 2
    fi
    mkdir -p "$output" || exit 2
    output=$(cd "$output" && pwd)
fi
build=$output/build plugins=$output/build/plugins
model=${onnx:-$output/model.onnx}
# The plugin just built; the other libraries are the installed package's.
export LITEDETR_LIBRARY_PATH=$plugins/tensorrt
echo "LITEDETR_LIBRARY_PATH=$LITEDETR_LIBRARY_PATH"

names=() statuses=() seconds=()
failed='' # the steps that failed or were skipped, each between spaces

add() { # add NAME STATUS SECONDS
    names+=("$1") statuses+=("$2") seconds+=("$3")
    echo "-- $1: $2"
}

step() { # step NAME NEEDED... -- COMMAND...: run it into NAME.log, unless a step that it needs failed
    local name=$1 needed begun=$SECONDS status
    shift
    while [ "$1" != -- ]; do
        needed=$1
        shift
        case $failed in *" $needed "*)
            failed="$failed $name "
            add "$name" "skipped: it needs $needed" 0
            return
            ;;
        esac
    done
    shift
    printf '== %s:' "$name"
    printf ' %q' "$@"
    echo
    if [ -n "$dry_run" ]; then
        add "$name" "not run" 0
        return
    fi
    (cd "$output" && "$@") 2>&1 | tee "$output/$name.log"
    status=${PIPESTATUS[0]}
    if [ "$status" -eq 0 ]; then
        add "$name" passed $((SECONDS - begun))
    else
        failed="$failed $name "
        add "$name" "failed: exit status $status, see $name.log" $((SECONDS - begun))
    fi
}

show_table() {
    echo
    [ -z "$dry_run" ] || echo "DRY RUN: these commands were printed; none was run, and nothing was measured."
    for place in "${!names[@]}"; do
        printf '%-18s %5s s  %s\n' "${names[place]}" "${seconds[place]}" "${statuses[place]}"
    done
    [ -n "$dry_run" ] || echo "logs, engines and the report: $output"
}

interrupted() {
    show_table
    exit 130
}
trap interrupted INT TERM

# Which board, power mode and versions: figures mean nothing without them.
step system -- sh -c 'cat /etc/nv_tegra_release /proc/device-tree/model; echo; nvpmodel -q; dpkg -l "tensorrt*" "libnvinfer*" "nvidia-jetpack*"; nvcc --version; true'
step doctor -- litedetr doctor
# ONNX Runtime's and OpenVINO's parts are the installed package's.
step configure -- cmake -S "$repository" -B "$build" -DCMAKE_BUILD_TYPE=Release -DLITEDETR_TESTS=ON \
    -DLITEDETR_ONNXRUNTIME=OFF -DLITEDETR_OPENVINO=OFF
step plugin configure -- cmake --build "$build" --parallel "$(nproc)" --target litedetr_tensorrt kda_cuda_test tensorrt_harness
step kernels plugin -- "$plugins/tests/kda_cuda_test"
step plugin-harness plugin -- "$plugins/tests/tensorrt_harness" "$plugins/tensorrt/liblitedetr_tensorrt.so"
if [ -n "$onnx" ]; then
    add export "skipped: --onnx gives the model" 0
else
    step export -- litedetr export "${checkpoint:-lite-dino-shapes}" --recipe "$repository/export/orin-fp16.toml" \
        --image-size "$size" --output "$model"
fi
step trtexec plugin export -- env "TRTEXEC=$trtexec" "PLUGIN=$plugins/tensorrt/liblitedetr_tensorrt.so" "SIZE=$size" \
    "$repository/export/trtexec.sh" "$model" "$output/trtexec.plan" 1,1,1
step build plugin export -- litedetr build "$model" --output "$output/model.plan" --batch 1 --no-verify
step verify build -- litedetr verify "$output/model.plan" "$model"
if [ -n "$onnx" ] && [ -z "$checkpoint" ]; then
    weights=(--unchecked)
else
    weights=(--checkpoint "${checkpoint:-lite-dino-shapes}")
fi
# With the module's power, which the benchmark reads from the hwmon sensors.
step latency build -- litedetr benchmark latency "$output/model.plan" "${weights[@]}" \
    --device cuda --output "$output/latency"

show_table
[ -z "${failed// /}" ]
