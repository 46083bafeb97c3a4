#!/usr/bin/env bash
# Pretrains on the GPUs of this machine by `accelerate launch`. Started again, it goes on from the last checkpoint.
#
#   launch/accelerate.sh CONFIG DATA OUTPUT [argument of pretrain.py ...]
#
#   GPUS            how many (all)
#   LAUNCH_CONFIG   accelerate's config, with or without a rannc_config section (configs/rannc.yaml)
set -euo pipefail
config=$1 data=$2 output=$3
shift 3
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

exec accelerate launch --config_file "${LAUNCH_CONFIG:-$recipe/configs/rannc.yaml}" --num_processes "$gpus" \
    "$recipe/pretrain.py" --config "$config" --data "$data" --output "$output" "$@"
