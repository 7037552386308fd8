#!/bin/sh
# One vlm_tune run on several machines, by torchrun: start this on each of them, with NODE counted from 0.
#   HEAD=10.0.0.1 NODES=2 NODE=0 GPUS=8 sh torchrun.sh recipe.yaml [options of `vlm-tune sft`]
# HEAD is the address at which machine 0 is reached. Run with two network namespaces of one machine, on CPU (there with
# GLOO_SOCKET_IFNAME set to the network's device, because the host's name was no address of it); not run on a GPU.
set -eu
# torchrun kills ranks that have not ended so many seconds after a signal: a large checkpoint takes its time.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec torchrun \
  --nnodes "${NODES:-2}" --node_rank "${NODE:?this machine, from 0}" --nproc_per_node "${GPUS:-8}" \
  --master_addr "${HEAD:?the address of machine 0}" --master_port "${PORT:-29500}" \
  -m vlm_tune.cli sft "$@"
