#!/usr/bin/env bash
# Installs a wheel of aarch64 beside a Python of that processor and runs the shipped detector with it, under QEMU:
#
#   tools/run_aarch64_wheel.sh WHEEL MODEL.onnx IMAGE
#
# For Debian, with qemu-user.  Nothing is installed on the system: Debian's Python and the packages that the wheel needs
# are unpacked into build/aarch64-python.
set -euo pipefail
. "$(dirname "$0")/private_apt.sh"

[ $# -eq 3 ] || { echo "usage: $0 WHEEL MODEL.onnx IMAGE" >&2; exit 2; }
command -v qemu-aarch64 >/dev/null || { echo "$0: qemu-aarch64 is not installed (Debian: qemu-user)." >&2; exit 1; }
wheel=$(realpath "$1") model=$2 image=$3
folder=$(realpath "$(dirname "$0")/..")/build/aarch64-python
root=$folder/root
if ! [ -d "$root" ]; then
  mkdir -p "$folder/apt"
  suite=$(. /etc/os-release && echo "$VERSION_CODENAME")
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(debian_archive main) $suite main" \
    >"$folder/apt/sources.list"
  arm() { private_apt "$folder" -o APT::Architecture=arm64 -o APT::Architectures=arm64 "$@"; }
  arm update
  arm install --yes --no-install-recommends --download-only python3-minimal libpython3-stdlib libstdc++6
  for package in "$folder"/apt/cache/archives/*.deb; do dpkg -x "$package" "$root.unfinished"; done
  mv "$root.unfinished" "$root"
fi
python=$(readlink -f "$root/usr/bin/python3")
version=${python##*python}
rm -rf "$folder/site"
# ONNX Runtime 1.20: QEMU 7 cannot load the library of 1.32.
"$(dirname "$0")/../.venv/bin/python" -m pip --disable-pip-version-check install --quiet --no-warn-conflicts \
  --target "$folder/site" \
  --only-binary=:all: --implementation cp --python-version "$version" \
  $(for glibc in $(seq 17 36); do echo "--platform=manylinux_2_${glibc}_aarch64"; done) \
  "$wheel[onnxruntime]" 'onnxruntime<1.21'
PYTHONPATH=$folder/site qemu-aarch64 -L "$root" \
  "$python" "$folder/site/bin/litedetr" predict "$model" "$image" -o "$folder/found.png"
