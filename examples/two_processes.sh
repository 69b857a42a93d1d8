#!/usr/bin/env bash
# Two processes of two CPU devices each train one run on loopback, as two computers would.
#   bash examples/two_processes.sh [FOLDER]
set -euo pipefail
folder="${1:-$(mktemp -d)}"
port="${PORT:-12355}"
export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=2
for id in 0 1; do
    "${PYTHON:-python}" -m pjax train --dataset digits --hidden 32 --steps 40 --batch-size 128 \
        --runs-dir "$folder" --name two \
        --coordinator "127.0.0.1:$port" --num-processes 2 --process-id "$id" &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
