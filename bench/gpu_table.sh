#!/usr/bin/env bash
# Fits and scores tables on this machine's GPU; made for machines that lend ten minutes a call.
#
#   bench/gpu_table.sh [default|paper|all]
#
#   default   configs/table/default.yaml on Adult, Shoppers, Magic and Beijing, three seeds each
#   paper     configs/table/paper.yaml on Adult (480,000 steps), sampled and scored at the step it has reached
#   all       half of the time for either (the default)
#
# The same command goes on where it stopped. State lies in $RUNS (default runs/gpu_table); when $OUT is set it is also
# packed into $OUT/gpu_table.tar.gz, and $RESUME names such a file to begin from on a fresh machine.
# MINUTES (default 9) is the time to use. KEY=VALUE settings for every fit go into $OVERRIDES, e.g. for a quick try
#   OVERRIDES="train.steps=20 sample.steps=4 network.width=8" SETS=magic SEEDS=1 MINUTES=3 GRID=fast bench/gpu_table.sh all
#
# Needs Python with PyTorch, Triton, pandas, scikit-learn, pydantic and typer. Wheels in $WHEELS (default .whl) are
# installed aside, without a network: on a machine that lacks them, pydantic, pydantic_core, typing_inspection and
# annotated_types are needed; xgboost-cpu only for MLE. Without it, the synthetic rows are kept and
#   anystate bench table --quality --out RUNS
# scores them elsewhere. Trend, Shape and copies need nothing more: sdmetrics is not used.
set -uo pipefail
what=${1:-all}
case $what in default | paper | all) ;; *) echo "unknown part '$what': default, paper or all" >&2; exit 2 ;; esac
root=$(cd "$(dirname "$0")/.." && pwd)
runs=${RUNS:-$root/runs/gpu_table}
python=${PYTHON:-python3}
seconds=$((${MINUTES:-9} * 60))
place=$(mktemp -d)
mkdir -p "$runs"
runs=$(cd "$runs" && pwd)
ln -s "$root" "$place/anystate"  # the repository folder is the package
export PYTHONPATH="$place:${PYTHONPATH:-}" PYTHONUNBUFFERED=1
status=0

keep() {  # the state into one file that can travel
    if [ -n "${OUT:-}" ]; then
        tar czf "$OUT/gpu_table.tar.gz" -C "$runs" .
        cp "$runs"/*.json "$runs"/*.txt "$OUT/" 2>/dev/null
    fi
    rm -rf "$place"
}
trap keep EXIT

if [ -n "${RESUME:-}" ]; then tar xzf "$RESUME" -C "$runs" || exit 2; fi
wheels=${WHEELS:-$root/.whl}
if compgen -G "$wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$place/site" "$wheels"/*.whl || exit 2
    export PYTHONPATH="$place:$place/site"
fi
for data in "${ANYSTATE_DATA:-}" "$root/shared/data" "$root/../shared/data"; do
    if [ -d "$data/tabular" ]; then export ANYSTATE_DATA=$data; break; fi
done
"$python" - <<'PY' || exit 2
import importlib.util, sys
lack = [m for m in ("torch", "pandas", "sklearn", "pydantic", "typer", "rich", "safetensors", "yaml", "jinja2") if not importlib.util.find_spec(m)]
if lack:
    sys.exit(f"this Python lacks {', '.join(lack)}: put wheels into $WHEELS")
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", torch.__version__)
if not importlib.util.find_spec("xgboost"):
    print("xgboost is not installed: MLE stays open, the synthetic rows are kept")
PY

part() {  # name, seconds, command…: runs it under a time limit, shows and keeps its output; a limit is no failure
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
    part default "$limit" "$python" - "$runs" "${SETS:-adult,shoppers,magic,beijing}" "${SEEDS:-3}" "${overrides[@]}" <<'PY'
import sys
from pathlib import Path
from rich.console import Console
import os
from anystate.bench.table_quality import quality
from anystate.bench.table_recipes import recipes
runs, sets, seeds, *overrides = sys.argv[1:]
# seed by seed over all sets, so that a limit leaves every set measured before any is measured twice
for seed in range(int(seeds)):
    ours = recipes(Path(runs), overrides=overrides)
    quality(sets.split(","), [seed], ["default"], ours, None, Path(runs) / "rows.json", os.environ.get("GRID", "official"), Console(width=200))
PY
fi

if [ "$what" != default ]; then
    fit=$runs/adult-paper-0
    reserve=${RESERVE:-120}  # seconds for sampling and scoring
    part paper $(($(left) - reserve)) "$python" -m anystate table fit "${PAPER_TABLE:-adult}" --config table/paper \
        train.save_every=5000 "${overrides[@]}" --out "$fit"
    if compgen -G "$fit/step_*" >/dev/null; then
        part paper-score "$(left)" "$python" - "$fit" "$runs" <<'PY'
import dataclasses, json, os, sys, time
from pathlib import Path
from anystate.bench.origin import origin
from anystate.bench.table_columns import load_schema, roles_of
from anystate.bench.table_metrics import copied, density
from anystate.bench.table_mle import mle
from anystate.train.checkpoint import latest
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
