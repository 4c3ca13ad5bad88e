#!/bin/bash
# A job where all that you have is torchrun: run this on each node, with NODE_RANK=0, 1, … and the rest alike.
#   NODES=4 SPARES=1 RANKS=8 NODE_RANK=0 MASTER_ADDR=node0 ETCD_ENDPOINTS=http://etcd0:2379 bash torchrun.sh [overrides of train.py]
# LIGHTNING_GEMINI_TOKEN must be set to the same secret on all of them (openssl rand -hex 32), LIGHTNING_GEMINI_DOMAIN to the node's rack.
set -euo pipefail

: "${NODES:?nodes of the world, without the spares}" "${RANKS:?ranks on each node}" "${NODE_RANK:?number of this node, from 0}"
: "${MASTER_ADDR:?address of node 0}" "${ETCD_ENDPOINTS:?URLs of etcd, with commas between them}"
: "${LIGHTNING_GEMINI_TOKEN:?the secret of the job}"
JOB=${JOB:-train-$MASTER_ADDR}

# torchrun only starts the agents and tells them their place. --max-restarts 0: starting lost processes anew is the agents' business.
exec torchrun --nnodes "$((NODES + ${SPARES:-0}))" --node-rank "$NODE_RANK" --nproc-per-node 1 --max-restarts 0 \
    --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}" --no-python \
    lightning-gemini run --nnodes "$NODES" --nproc-per-node "$RANKS" --job "$JOB" --etcd "$ETCD_ENDPOINTS" \
    train.py strategy=gemini trainer.num_nodes="$NODES" "$@"
