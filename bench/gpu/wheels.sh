#!/usr/bin/env bash
# Downloads into .whl/ the packages that a GPU machine without network lacks; bench/gpu/window.sh installs them there.
#
# For x86-64 Linux with Python 3.12 and PyTorch installed; the versions are those of constraints.txt.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
# without XGBoost: its grids would use up the time on the GPU, and synthetic rows can be evaluated on any machine
wanted=(pydantic pydantic_core annotated-types typing-inspection webdataset braceexpand)
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
for package in "${wanted[@]}"; do
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        "${platforms[@]}" --constraint "$root/constraints.txt" --dest "$root/.whl" "$package"
done
du -sh "$root/.whl"
