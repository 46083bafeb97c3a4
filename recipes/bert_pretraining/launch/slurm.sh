#!/usr/bin/env bash
# Pretrains on several nodes under Slurm. A job that is requeued, or submitted again, goes on from the last checkpoint.
#
#   sbatch --nodes=4 launch/slurm.sh CONFIG DATA OUTPUT [argument of pretrain.py ...]
#
# Submit it from this recipe's folder; DATA and OUTPUT are on a file system that all nodes share. GPUS, PRECISION and
# LAUNCH_CONFIG as in torchrun.sh, which it starts once on each node.
#SBATCH --job-name=bert
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

export NODES=$SLURM_JOB_NUM_NODES
MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share the first node get ports of their own.
export MASTER PORT=$((20000 + SLURM_JOB_ID % 20000)) GPUS=${GPUS:-8}

# SLURM_NODEID differs from node to node, so the shells of the nodes expand it, not this one.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash launch/torchrun.sh "$@"' bash "$@"
