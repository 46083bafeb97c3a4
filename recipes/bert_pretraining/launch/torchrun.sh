#!/usr/bin/env bash
# Pretrains by plain torchrun on one node or, started once on each, on several. Started again, it goes on from the last
# checkpoint. OUTPUT is on a file system that all nodes share.
#
#   launch/torchrun.sh CONFIG DATA OUTPUT [argument of pretrain.py ...]
#
#   NODES, NODE_RANK, MASTER, PORT   number of nodes (1), which this is (0), the first one's address (localhost) and port
#   GPUS            processes on each node (all GPUs)
#   PRECISION       bf16, fp16 or no (bf16)
#   LAUNCH_CONFIG   file with a rannc_config section (configs/rannc.yaml); empty: plain data parallel training
set -euo pipefail
config=$1 data=$2 output=$3
shift 3
recipe=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

export ACCELERATE_MIXED_PRECISION=${PRECISION:-bf16}
program=("$recipe/pretrain.py")
if [[ -n ${LAUNCH_CONFIG=$recipe/configs/rannc.yaml} ]]; then
    export RANNC_CONFIG=$LAUNCH_CONFIG
    program=(-m rannc_hf.run "$recipe/pretrain.py")
fi

exec torchrun --nnodes "${NODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "$gpus" \
    --master_addr "${MASTER:-localhost}" --master_port "${PORT:-29500}" \
    "${program[@]}" --config "$config" --data "$data" --output "$output" "$@"
