#!/usr/bin/env bash
# Pretraining under DeepSpeed's own launcher, for sites that start their jobs with it:
#   launch/deepspeed.sh configs/pretrain/RUN.yaml [key.path=value ...]
# Its exit code is not to be relied on (a killed run may end with 0): ask RUN/exit.json, or use `scaletrain launch`.
set -euo pipefail
config=${1:?"usage: launch/deepspeed.sh CONFIG [key.path=value ...]"}
shift
# RANKS: processes on this machine. The port is picked, as DeepSpeed's default is often taken.
port=$(python -c 'from scaletrain.launcher.local import free_port; print(free_port())')
exec deepspeed --num_accelerators "${RANKS:-2}" --master_port "$port" --module scaletrain pretrain --config "$config" "$@"
