#!/bin/sh
# One vlm_tune run on several machines, by torchrun: start this on each of them, with the same arguments.
#   HEAD=10.0.0.1 NODES=2 GPUS=8 sh torchrun.sh recipe.yaml [options of `vlm-tune sft`]
# Not run on several machines, nor on a GPU.
set -eu
exec torchrun \
  --nnodes "${NODES:-2}" --nproc_per_node "${GPUS:-8}" \
  --rdzv_backend c10d --rdzv_endpoint "${HEAD:?the first machine's address}:${PORT:-29500}" --rdzv_id "${RUN:-vlm_tune}" \
  -m vlm_tune.cli sft "$@"
