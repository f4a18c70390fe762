#!/bin/sh
# The ledger's queue on a GPU that is lent for minutes at a time: slices of nine minutes, each going on where the last
# one stopped.
#
#   benchmarks/gpu.sh [RECIPE...]     most informative first: the pairs that a claim rests on
#
# SLICES  how many slices to run now (1)          SEEDS  (0-4)          PYTHON  the interpreter (.venv/bin/python)
# OUT     a folder that receives results.csv and todo.txt, for machines whose files do not stay
set -eu
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- recipes/camvid/supervised-resnet50-46.yaml recipes/camvid/fixmatch-resnet50-46.yaml

keep() {
    for file in benchmarks/results.csv benchmarks/todo.txt; do
        if [ -n "${OUT:-}" ] && [ -e "$file" ]; then cp "$file" "$OUT"; fi
    done
}
trap keep EXIT

slice=0
while [ "$slice" -lt "${SLICES:-1}" ]; do
    "${PYTHON:-.venv/bin/python}" benchmarks/accuracy.py "$@" --seeds "${SEEDS:-0-4}" --minutes 9 --subset new_drive=Seq05VD
    slice=$((slice + 1))
    [ -e benchmarks/todo.txt ] || break
done
