#!/usr/bin/env bash
# Finds or downloads the C headers of ONNX Runtime and prints where they are:
#
#   tools/get_onnxruntime_headers.sh FOLDER
#
# ORT_INCLUDE_DIR in the environment names headers that are there already.  Else they come from the distribution's
# package: libonnxruntime-dev on Debian (of the release named below, whatever this machine's is) and Ubuntu (24.04 or
# newer), onnxruntime-devel on Fedora.  It is unpacked into FOLDER, never installed, and needs no root.  The archive's
# address and signing key are those that this machine's package manager already uses, and it checks the signature.
# A second run finds the headers in FOLDER and downloads nothing.
set -euo pipefail
. "$(dirname "$0")/private_apt.sh"

debian=trixie

fail() {
  echo "$(basename "$0"): $1" >&2
  exit 1
}
find_header() { find "$1" -name onnxruntime_c_api.h -printf '%h\n' -quit 2>/dev/null; }
reason() { grep -m 1 '^E: ' "$log" || tail -n 1 "$log"; }

[ $# -eq 1 ] || { echo "usage: $0 FOLDER" >&2; exit 2; }
folder=$1
if [ -n "${ORT_INCLUDE_DIR:-}" ]; then
  header=$(find_header "$ORT_INCLUDE_DIR" || true)
  [ -n "$header" ] || fail "ORT_INCLUDE_DIR is $ORT_INCLUDE_DIR, where there is no onnxruntime_c_api.h."
  echo "$header"
  exit 0
fi
if [ -d "$folder" ] && header=$(find_header "$folder") && [ -n "$header" ]; then
  echo "$header"
  exit 0
fi

mkdir -p "$(dirname "$folder")"
scratch=$(mktemp -d "$folder.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
log=$scratch/log
mkdir "$scratch/unpacked"

from_apt() { # SUITE COMPONENT KEYRING
  [ -r "$3" ] || fail "$3, which verifies the archive of $1, is missing."
  local site
  site=$(debian_archive "$2")
  [ -n "$site" ] || fail "apt on this machine has no archive with the component $2 among its sources."
  mkdir -p "$scratch/apt"
  echo "deb [signed-by=$3] $site $1 $2" >"$scratch/apt/sources.list"
  private_apt "$scratch" update >"$log" 2>&1 || fail "the package list of $1 cannot be read ($(reason))."
  (cd "$scratch" && private_apt "$scratch" download libonnxruntime-dev) >"$log" 2>&1 ||
    fail "libonnxruntime-dev of $1 cannot be downloaded ($(reason))."
  dpkg -x "$scratch"/libonnxruntime-dev_*.deb "$scratch/unpacked" || fail "libonnxruntime-dev does not unpack."
}

from_dnf() {
  (cd "$scratch" && dnf --quiet download onnxruntime-devel) >"$log" 2>&1 ||
    fail "onnxruntime-devel cannot be downloaded ($(reason))."
  (cd "$scratch/unpacked" && rpm2cpio "$scratch"/onnxruntime-devel-*.rpm | cpio -id --quiet) ||
    fail "onnxruntime-devel does not unpack."
}

codename=$(. /etc/os-release 2>/dev/null && echo "${UBUNTU_CODENAME:-}" || true)
keyrings=/usr/share/keyrings
if command -v apt-get >/dev/null && command -v dpkg >/dev/null; then
  if [ -n "$codename" ]; then
    from_apt "$codename" universe $keyrings/ubuntu-archive-keyring.gpg
  else
    from_apt "$debian" main $keyrings/debian-archive-keyring.gpg
  fi
elif command -v dnf >/dev/null && command -v rpm2cpio >/dev/null && command -v cpio >/dev/null; then
  from_dnf
else
  fail "neither apt-get and dpkg nor dnf, rpm2cpio and cpio are installed, and the headers come from a distribution's package."
fi
[ -n "$(find_header "$scratch/unpacked")" ] || fail "the distribution's package has no onnxruntime_c_api.h."

# One rename, so that no half-filled folder is ever found; of two that run at once the first wins.
mv -T "$scratch/unpacked" "$folder" 2>/dev/null || [ -n "$(find_header "$folder")" ] ||
  fail "$folder cannot be written."
find_header "$folder"
