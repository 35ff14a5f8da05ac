#!/usr/bin/env bash
# Fits and scores tables on this machine's GPU; made for machines that lend ten minutes a call.
#
#   bench/gpu_table.sh [default|long|paper|all]
#
#   default   configs/table/default.yaml, three seeds each, on Adult and on those of Shoppers, Magic and Beijing that
#             lie in $ANYSTATE_DATA/tabular or in shared/data/tabular of the checkout
#   long      the same with configs/table/long.yaml
#   paper     configs/table/paper.yaml on Adult (480,000 steps), sampled and scored at the step it has reached
#   all       half of the time for paper, the other half for default and, what it leaves, long (the default)
#
# The same command goes on where it stopped. State lies in $RUNS (default runs/gpu_table); when $OUT is set it is also
# packed into $OUT/gpu_table.tar.gz, and $RESUME names such a file to begin from on a fresh machine.
# MINUTES (default 9) is the time to use. KEY=VALUE settings for every fit go into $OVERRIDES, e.g. for a quick try
#   OVERRIDES="train.steps=20 sample.steps=4 network.width=8" SETS=magic SEEDS=1 MINUTES=3 GRID=fast bench/gpu_table.sh all
#
# Needs what the package needs; where a machine has no network, bench/gpu_wheels.sh fetches what one such machine lacked
# into .whl/ beforehand. XGBoost is needed for MLE alone: without it the synthetic rows are kept in $RUNS, and
#   anystate bench table --quality --out RUNS
# scores them elsewhere. Trend, Shape and copies need nothing more.
set -uo pipefail
what=${1:-all}
case $what in default | long | paper | all) ;; *) echo "unknown part '$what': default, long, paper or all" >&2; exit 2 ;; esac
: "${OUT:=}"
here=$(cd "$(dirname "$0")" && pwd)
runs=${RUNS:-$here/../runs/gpu_table}
mkdir -p "$runs"
runs=$(cd "$runs" && pwd)
packed=$OUT
OUT=${OUT:-$runs}
source "$here/gpu_place.sh"
seconds=$((${MINUTES:-9} * 60))

keep() {  # the state into one file that can travel
    if [ -n "$packed" ]; then
        tar czf "$packed/gpu_table.tar.gz" -C "$runs" .
        cp "$runs"/*.json "$packed/" 2>/dev/null
    fi
    rm -rf "$place"
}
trap keep EXIT
trap 'exit 1' TERM INT  # packs what there is

[ -d "${ANYSTATE_DATA:-}" ] && ANYSTATE_DATA=$(realpath "$ANYSTATE_DATA")
if [ -n "${RESUME:-}" ]; then tar xzf "$RESUME" -C "$runs" || exit 2; fi
mkdir -p "$place/data/tabular"
ln -s "$root/train/data/adult" "$place/data/tabular/adult"  # Adult comes with the package; the others must be brought
for data in "${ANYSTATE_DATA:-}" "$root/shared/data" "$root/../shared/data" "$place/data"; do
    if [ -d "$data/tabular" ]; then export ANYSTATE_DATA=$data; break; fi
done
sets=${SETS:-$(for name in adult shoppers magic beijing; do [ -d "$ANYSTATE_DATA/tabular/$name" ] && echo "$name"; done | paste -sd,)}
echo "$machine"
"$python" -c 'import xgboost' 2>/dev/null || echo "xgboost is not installed: MLE stays open, the synthetic rows are kept"

limited() {  # name, seconds, command…: as part, but a time limit is no failure
    local name=$1 limit=$2 code
    shift 2
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left"; return 1; fi
    timeout -s INT -k 10 "$limit" "$@" 2>&1 | tee -a "$runs/$name.txt"
    code=${PIPESTATUS[0]}
    echo "== $name: exit $code after $SECONDS s in all" | tee -a "$runs/$name.txt"
    [ "$code" = 0 ] || [ "$code" = 124 ] || { status=1; return 1; }
}

left() { echo $((seconds - SECONDS)); }
cd "$place" || exit 2
read -ra overrides <<<"${OVERRIDES:-}"

if [ "$what" != paper ]; then
    limit=$(left)
    [ "$what" = all ] && limit=$((limit / 2))
    recipes=$what
    [ "$what" = all ] && recipes=default,long
    limited "$recipes" "$limit" "$python" - "$runs" "$sets" "${SEEDS:-3}" "$recipes" "${overrides[@]}" <<'PY'
import itertools, os, sys
from pathlib import Path
from rich.console import Console
from anystate.bench.table_quality import quality
from anystate.bench.table_recipes import recipes
runs, sets, seeds, names, *overrides = sys.argv[1:]
ours = recipes(Path(runs), overrides=overrides)
# seed by seed over all sets, so that a limit leaves every set measured before any is measured twice
for name, seed in itertools.product(names.split(","), range(int(seeds))):
    quality(sets.split(","), [seed], [name], ours, None, Path(runs) / "rows.json", os.environ.get("GRID", "official"), Console(width=200))
PY
fi

if [ "$what" = paper ] || [ "$what" = all ]; then
    fit=$runs/adult-paper-0
    reserve=${RESERVE:-120}  # seconds for sampling and scoring
    limited paper $(($(left) - reserve)) "$python" -m anystate table fit "${PAPER_TABLE:-adult}" --config table/paper \
        train.save_every=5000 "${overrides[@]}" --out "$fit"
    if compgen -G "$fit/step_*" >/dev/null; then
        limited paper-score "$(left)" "$python" - "$fit" "$runs" <<'PY'
import dataclasses, json, os, sys, time
from pathlib import Path
from anystate.bench.table_columns import load_schema, roles_of
from anystate.bench.table_metrics import copied, density
from anystate.bench.table_mle import mle
from anystate.train.checkpoint import latest
from anystate.train.origin import origin
from anystate.train.synthesizer import BUNDLED, TableSynthesizer, load_bundled
fit, runs = map(Path, sys.argv[1:])
(train, test), model = load_bundled("adult"), TableSynthesizer.load(fit)
began = time.perf_counter()
synth = model.sample(len(train), seed=0)
step, seconds = int(latest(fit).name[5:]), time.perf_counter() - began
synth.to_csv(runs / f"adult-paper-{step}.csv.gz", index=False)
roles = roles_of(train, load_schema(BUNDLED["adult"] / "schema.yaml"))
near = density(train, synth, roles)
row = {"set": "adult", "recipe": "paper", "step": step, "shape": near.shape, "trend": near.trend}
row |= {"copies": copied(train, synth, roles), "evaluations": model.system_.config.sample.steps}
row |= {"sampling_seconds": round(seconds, 1), "origin": origin()}
file = runs / "paper.json"
rows = json.loads(file.read_text()) if file.exists() else []
file.write_text(json.dumps([*rows, row], indent=1) + "\n")
print(f"paper.yaml at step {step}: Shape {100 * near.shape:.2f}, Trend {100 * near.trend:.2f}")
try:
    row["mle"] = dataclasses.asdict(mle(synth, test, roles, os.environ.get("GRID", "official")))
    file.write_text(json.dumps([*rows, row], indent=1) + "\n")
    print(f"MLE {row['mle']['score']:.4f} (official pick {row['mle']['official']:.4f})")
except ImportError:
    print("no MLE: xgboost is not installed")
PY
    fi
fi
exit $status
