#!/bin/sh
# Several machines, one call on each:
#     NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 launch/torchrun.sh recipe=quickstart placement.spread=true [key=value ...]
# torchrun's rendezvous makes one Ray cluster of them; node 0 runs the controller, and all end together.
#
#   NNODES       machines (1)
#   NODE_RANK    which of them this is, from 0 (0)
#   MASTER_ADDR  address of node 0, as the others reach it (127.0.0.1)
#   MASTER_PORT  a free port there (29500)
#   PYTHON       the Python that has asystem (the first on PATH)
set -eu
exec "${PYTHON:-python3}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node-rank="${NODE_RANK:-0}" --nproc-per-node=1 \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${MASTER_PORT:-29500}" \
    -m asystem train "$@"
