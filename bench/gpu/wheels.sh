#!/usr/bin/env bash
# Fetches, into .whl/, the packages that a GPU machine without network lacks; bench/gpu/window.sh installs them there.
#
# For x86-64 Linux with Python 3.12 and PyTorch already there; versions are those of constraints.txt.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# not XGBoost: its grids would take the GPU's minutes, and synthetic rows can be scored anywhere
wanted=(pydantic pydantic_core annotated-types typing-inspection webdataset braceexpand torchao)
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
for package in "${wanted[@]}"; do
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --constraint "$root/constraints.txt" --dest "$root/.whl" "$package"
done
du -sh "$root/.whl"
