#!/usr/bin/env bash
# Speed end to end on this machine's GPU, the plain engine beside ours: training, sampling, tables, growth, kernels.
#
#   bench/gpu_all.sh [--quick]       --quick: tiny sizes, also without a GPU: does everything run?
#
# Under 9 minutes. Without network: run bench/gpu_wheels.sh on a machine that has it and bring .whl/ along.
# Results go to $OUT, or bench/results/ without it: all-MACHINE.json and .html, renewed after every part, and
# all-MACHINE-more.tar.gz with profiles, traces and plots.
set -uo pipefail
source "$(dirname "$0")/gpu_place.sh"
cd "$place" || exit 2
if [ "$machine" = cpu ] && [ "${1:-}" != --quick ]; then
    echo "no GPU here: official sizes would take hours; try: bench/gpu_all.sh --quick" >&2
    exit 2
fi
part all 530 "$python" -m anystate bench all --json "$out/all-$slug.json" --html "$out/all-$slug.html" "$@"
tar czf "$out/all-$slug-more.tar.gz" -C "$out" "all-$slug-more" && rm -r "$out/all-$slug-more"
exit $status
