# Sourced by the bench/gpu_*.sh: makes `import anystate` work on a machine where nothing can be installed from a network.
# Sets root, out (where results go: $OUT, else bench/results), python, place (a temporary folder), machine and slug.
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-$root/bench/results}
python=${PYTHON:-python3}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
ln -s "$root" "$place/anystate"  # the repository folder is the package
export PYTHONPATH="$place${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if compgen -G "$root/.whl/*.whl" >/dev/null; then  # made by bench/gpu_wheels.sh
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$place/site" "$root"/.whl/*.whl
    export PYTHONPATH="$PYTHONPATH:$place/site"
fi
mkdir -p "$out"
machine=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")') || exit 2
slug=$(echo "$machine" | tr 'A-Z ' 'a-z-')
status=0

part() {  # name, seconds, command…: runs it under a time limit, shows its output and keeps it, all in $log if that is set
    local name=$1 seconds=$2 code
    shift 2
    [ -n "${log:-}" ] || : >"$out/$name-$slug.txt"
    timeout "$seconds" "$@" 2>&1 | tee -a "${log:-$out/$name-$slug.txt}"
    code=${PIPESTATUS[0]}
    echo "== $name: exit $code after ${SECONDS} s in all"
    [ "$code" = 0 ] || status=1
}
