#!/usr/bin/env bash
# Runs the measurements of one of three ten-minute calls on a GPU; docs/gpu.md says what each call measures and writes.
#
#   bench/gpu/window.sh 1|2|3 [--only PARTS] [--dry-run]
#
# Needs Python ($PYTHON, else .venv's, else python3) with PyTorch and Triton, but no network: run bench/gpu/wheels.sh on
# a machine that has one, and copy .whl/ along.
# Results go to $OUT, or bench/results/ without it. Compiler caches, runs and packages stay in .gpu/ of the checkout,
# where the next call on the same machine finds them.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ] && python=$root/.venv/bin/python
export OUT=${OUT:+$(realpath -m "$OUT")} ANYSTATE_GPU_FOLDER=${ANYSTATE_GPU_FOLDER:-$root/.gpu} PYTHONUNBUFFERED=1
export TRITON_CACHE_DIR=$ANYSTATE_GPU_FOLDER/cache/triton TORCHINDUCTOR_CACHE_DIR=$ANYSTATE_GPU_FOLDER/cache/inductor
mkdir -p "$ANYSTATE_GPU_FOLDER"
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
ln -s "$root" "$place/anystate" # the repository folder is the package
export PYTHONPATH=$place${PYTHONPATH:+:$PYTHONPATH}
if ! "$python" -c 'import pydantic, webdataset' 2>/dev/null && compgen -G "$root/.whl/*.whl" >/dev/null; then
    site=$ANYSTATE_GPU_FOLDER/site # packages from bench/gpu/wheels.sh
    if [ ! -d "$site" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site.new" "$root"/.whl/*.whl || exit 2
        mv "$site.new" "$site"
    fi
    export PYTHONPATH=$PYTHONPATH:$site
fi
cd "$place" || exit 2
"$python" -m anystate.bench.gpu.window "$@"
