#!/bin/sh
# Build and time an engine of an ONNX model with trtexec, TensorRT 10.3 to 11.x, and print the command first.
set -eu

usage() {
    cat <<'TEXT'
usage: export/trtexec.sh MODEL.onnx ENGINE.plan [MIN,OPT,MAX] [trtexec option ...]

MIN,OPT,MAX: batches that the engine takes; 1,1,4 when not given.
SIZE=HEIGHTxWIDTH: size of the images, 800x1333 when not set.
MASK=1: the model takes a pixel mask.  RAW=1: it was exported with --outputs raw.
TRTEXEC: the program, trtexec when not set.  PLUGIN: the plugin library, this package's when not set.
DRY_RUN=1: print the command only.
TEXT
    exit 2
}

[ $# -ge 2 ] || usage
model=$1 engine=$2
shift 2
batches=1,1,4
case ${1-} in
[0-9]*) batches=$1 && shift ;;
esac

trtexec=${TRTEXEC:-trtexec}
# 'TensorRT.trtexec [TensorRT v101400]': major * 10000 + minor * 100 + patch
version=$("$trtexec" --help 2>&1 | sed -n 's/.*TensorRT v\([0-9][0-9]*\).*/\1/p' | head -n 1)
if [ -z "$version" ]; then
    echo "error: $trtexec does not say its version. Set TRTEXEC to the program itself." >&2
    exit 2
fi
if [ "$version" -lt 100300 ] || [ "$version" -ge 120000 ]; then
    echo "error: $trtexec is of version $version (major * 10000 + minor * 100). Install TensorRT 10.3 to 11.x." >&2
    exit 2
fi

size=${SIZE:-800x1333}
shapes() { # shapes BATCH
    text=images:$1x3x$size
    [ -n "${RAW-}" ] || text=$text,orig_target_sizes:$1x2
    [ -z "${MASK-}" ] || text=$text,pixel_mask:$1x$size
    echo "$text"
}
minimum=${batches%%,*} maximum=${batches##*,} rest=${batches#*,}
best=${rest%%,*}
plugin=${PLUGIN-$(python3 -c "import litedetr_deploy as ld; print(ld.native.library('tensorrt'))")}

set -- "$trtexec" --onnx="$model" --saveEngine="$engine" \
    --minShapes="$(shapes "$minimum")" --optShapes="$(shapes "$best")" --maxShapes="$(shapes "$maximum")" \
    --shapes="$(shapes "$best")" --profilingVerbosity=detailed --exportLayerInfo="$engine.layers.json" "$@"
# Empty for a model of standard ops.
[ -z "$plugin" ] || set -- "$@" --dynamicPlugins="$plugin"
if [ "$version" -lt 110000 ]; then
    # The precision is the graph's: never add --fp16.
    set -- "$@" --stronglyTyped
else
    # What 10 does by default, so that the times compare.
    set -- "$@" --noCudaGraph --noSpinWait --includeDataTransfers
fi

echo "$*"
[ -n "${DRY_RUN-}" ] || exec "$@"
