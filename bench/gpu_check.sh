#!/usr/bin/env bash
# Tests, verifies and measures every kernel on this machine's GPU, in at most 9 minutes.
#
#   bench/gpu_check.sh [size]        size: tiny, small or official (default)
#
# Needs Python with PyTorch and Triton; no network. Results go to $OUT, or bench/results/ without it.
# Each part has its own time limit; measurements are written after every operation, so a limit loses only the rest.
set -uo pipefail
size=${1:-official}
source "$(dirname "$0")/gpu_place.sh"
cd "$place" || exit 2

if [ "$machine" = cpu ] && [ "$size" = official ]; then
    echo "no GPU here: official sizes would take hours; try: bench/gpu_check.sh small" >&2
    exit 2
fi
part verify 130 "$python" -c 'import sys; from anystate.bench.verify import verify; sys.exit(not verify())'
if "$python" -c 'import pytest' 2>/dev/null; then
    # test_compiled needs no GPU; the tests' own conftest above tests/kernels needs more than PyTorch
    workers=()  # most of the time is the compiler's, which has cores enough
    [ "$machine" != cpu ] && "$python" -c 'import xdist' 2>/dev/null && workers=(-n 8)
    part tests 150 "$python" -m pytest "${workers[@]}" "$root/tests/kernels" --confcutdir="$root/tests/kernels" -q \
        -p no:cacheprovider -c "$root/tests/pytest.ini" --ignore="$root/tests/kernels/test_compiled.py"
else
    echo "== tests: skipped, pytest is not installed"
fi
part bench 250 "$python" -c 'import sys; from anystate.bench.kernels import run; sys.exit(run(size=sys.argv[1], json=sys.argv[2]))' \
    "$size" "$out/kernels-$slug.json"
exit $status
