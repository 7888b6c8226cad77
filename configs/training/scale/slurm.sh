#!/bin/bash
# One job on several nodes, requeued before its time is up and when it is preempted, until training is finished:
#   sbatch configs/training/scale/slurm.sh --config configs/training/image_folder.yaml --config configs/training/scale/ddp.yaml
# What follows the script's name goes to `train.py fit`. The run's folder must be on a file system that all nodes share.
#SBATCH --job-name=dpnp
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=dpnp-%j.log
#SBATCH --signal=B:USR1@120

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export OMP_NUM_THREADS=1

# The signal comes to this shell alone, two minutes before the time is up. Training needs no warning: it resumes by the same
# command from its last checkpoint, which is whole at every moment.
trap 'echo "time is almost up: requeueing job ${SLURM_JOB_ID}"; scontrol requeue "${SLURM_JOB_ID}"' USR1

srun --kill-on-bad-exit=1 python training/train.py fit "$@" --config configs/training/scale/slurm.yaml \
  --trainer.num_nodes="${SLURM_NNODES}" --trainer.devices="${SLURM_NTASKS_PER_NODE}" &
training=$!
# a trapped signal ends a wait; go on waiting until training itself has ended
while kill -0 "${training}" 2>/dev/null; do
  wait "${training}" && status=0 || status=$?
done
exit "${status:-0}"
