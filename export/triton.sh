#!/bin/sh
# Start NVIDIA's Triton container on a repository of `litedetr serve triton`, and print the command first.
set -eu

if [ $# -lt 1 ]; then
    cat <<'TEXT'
usage: export/triton.sh REPOSITORY [tritonserver option ...]

HTTP_PORT, GRPC_PORT, METRICS_PORT: ports on this machine, 8000, 8001 and 8002 when not set.
IMAGE: the container, nvcr.io/nvidia/tritonserver:24.10-py3 when not set.
DRY_RUN=1: print the command only.
TEXT
    exit 2
fi
[ -f "$1/start.sh" ] || {
    echo "error: $1 is not a repository of \`litedetr serve triton\`: it has no start.sh." >&2
    exit 2
}
repository=$(cd "$1" && pwd)
shift

# Docker, too, says that a port is in use, but only when the container has been downloaded.
for port in "${HTTP_PORT:=8000}" "${GRPC_PORT:=8001}" "${METRICS_PORT:=8002}"; do
    python3 - "$port" <<'CODE' || exit 2
import socket, sys
with socket.socket() as one:
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        one.bind(("", int(sys.argv[1])))
    except (OSError, OverflowError, ValueError) as error:
        fix = "End what uses it, or set HTTP_PORT, GRPC_PORT or METRICS_PORT to another."
        sys.exit(f"error: port {sys.argv[1]} cannot be used: {error}. {fix}")
CODE
done

gpus=
! grep -q KIND_GPU "$repository"/*/config.pbtxt || gpus=--gpus=all
# The repository has the same path inside: an op library is named by its absolute path.
inside='[ ! -f "$0/requirements.txt" ] || pip install --quiet -r "$0/requirements.txt"; exec "$0/start.sh" "$@"'
set -- docker run --rm --init ${gpus:+"$gpus"} --shm-size=1g \
    -p "$HTTP_PORT:8000" -p "$GRPC_PORT:8001" -p "$METRICS_PORT:8002" -v "$repository:$repository:ro" \
    "${IMAGE:-nvcr.io/nvidia/tritonserver:24.10-py3}" sh -c "$inside" "$repository" "$@"

for word; do # as a shell would take them
    case $word in
    *[!A-Za-z0-9_.,:/=-]*) printf "'%s' " "$word" ;;
    *) printf '%s ' "$word" ;;
    esac
done
echo
[ -n "${DRY_RUN-}" ] || exec "$@"
