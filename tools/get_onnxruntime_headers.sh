#!/usr/bin/env bash
# Downloads the C headers of ONNX Runtime into a folder and prints where they are:
#
#   tools/get_onnxruntime_headers.sh FOLDER
#
# They come from Debian's package libonnxruntime-dev, which exists since the release named below; on an older Debian
# that one package is fetched from there and unpacked, never installed.  The archive's address and its signing key are
# those that this machine's apt already uses; apt checks the signature.  Needs apt-get and dpkg, not root.
# A second run finds the headers in FOLDER and downloads nothing.
set -euo pipefail

suite=trixie
package=libonnxruntime-dev
keyring=/usr/share/keyrings/debian-archive-keyring.gpg

fail() {
  echo "$(basename "$0"): $1 Or give CMake the folder of onnxruntime_c_api.h: -DORT_INCLUDE_DIR=FOLDER." >&2
  exit 1
}

[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
folder=$1

find_header() { find "$1" -name onnxruntime_c_api.h -printf '%h\n' -quit; }

if [ -d "$folder" ] && header=$(find_header "$folder") && [ -n "$header" ]; then
  echo "$header"
  exit 0
fi

for tool in apt-get dpkg; do
  command -v "$tool" >/dev/null || fail "$tool is not installed, and the headers come from a Debian package."
done
[ -r "$keyring" ] || fail "$keyring, which verifies the Debian archive, is missing (package debian-archive-keyring)."

# The first archive that has the component main and is no security or update suite.
site=$(apt-get indextargets --format '$(SITE) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' |
  awk '$3 == "main" && $2 !~ /-/ { print $1; exit }')
[ -n "$site" ] || fail "apt on this machine has no Debian archive among its sources."

mkdir -p "$(dirname "$folder")"
scratch=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$scratch"/apt/{lists,cache}/partial
echo "deb [signed-by=$keyring] $site $suite main" >"$scratch/apt/sources.list"

# A private apt: its own lists and cache, nothing of the system's state is read or written.
private_apt() {
  apt-get -qq \
    -o Dir::State="$scratch/apt" -o Dir::State::Lists="$scratch/apt/lists" -o Dir::State::Status=/dev/null \
    -o Dir::Cache="$scratch/apt/cache" \
    -o Dir::Etc::SourceList="$scratch/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o APT::Sandbox::User= \
    -o Acquire::Languages=none \
    -o APT::Update::Error-Mode=any \
    "$@"
}
log=$scratch/log
reason() { grep -m 1 '^E: ' "$log" || tail -n 1 "$log"; }
private_apt update >"$log" 2>&1 || fail "the package list of Debian $suite cannot be had ($(reason))."
(cd "$scratch" && private_apt download "$package") >"$log" 2>&1 ||
  fail "$package of Debian $suite cannot be downloaded ($(reason))."
dpkg -x "$scratch/$package"_*.deb "$scratch/unpacked" || fail "$package does not unpack."
[ -n "$(find_header "$scratch/unpacked")" ] || fail "$package has no onnxruntime_c_api.h."

# One rename, so that no half-filled folder is ever found; of two that run at once the first wins.
mv -T "$scratch/unpacked" "$folder" 2>/dev/null || [ -n "$(find_header "$folder")" ] ||
  fail "$folder cannot be written."
find_header "$folder"
