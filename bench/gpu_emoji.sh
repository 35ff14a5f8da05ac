#!/usr/bin/env bash
# Emoji and their names on one GPU: packs, trains the three stages, evaluates, writes contact sheets.
#
#   bench/gpu_emoji.sh EMOJI.npz [seconds]     seconds: stop after so many (default 560); the same command goes on
#
# Without network: run bench/gpu_wheels.sh on a machine that has it and bring .whl/ along. Runs stay in runs/, which
# must still be there when the command is repeated. Results go to $OUT, or bench/results/ without it.
set -uo pipefail
pairs=$(realpath "${1:?usage: bench/gpu_emoji.sh EMOJI.npz [seconds]}") || exit 2
end=$((SECONDS + ${2:-560}))
source "$(dirname "$0")/gpu_place.sh"
read -ra settings <<<"${SETTINGS:-}"  # further settings of every stage, such as train.steps=20
log=$out/emoji-$slug.txt
cd "$root" || exit 2

left() { echo $((end - SECONDS > 1 ? end - SECONDS : 1)); }

[ -f data/emoji/dataset.yaml ] ||
    part emoji-pack 120 "$python" -m anystate data pack "$pairs" --out data/emoji --text bpe --states 512 --length 20
for stage in 1 2 3; do
    part "emoji-stage$stage" "$(left)" "$python" -m anystate train "emoji/stage$stage" "${settings[@]}"
    [ "$status" = 0 ] || { echo "== stopped in stage $stage: run the same command again"; exit 1; }
done
run=runs/emoji_stage3
part emoji-eval "$(left)" "$python" -m anystate eval "$run" --data data/emoji --json "$out/emoji-$slug.json"
for given in text image; do
    part "emoji-given-$given" "$(left)" "$python" -m anystate sample "$run" --data data/emoji --given "$given" --limit 64 \
        --out "runs/emoji_given_$given" --force
    cp "runs/emoji_given_$given/sheet.png" "$out/emoji-given-$given-$slug.png"
done
exit $status
