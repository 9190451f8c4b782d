#!/usr/bin/env bash
# Everything to measure on one CUDA card, in one call of at most 8 minutes; needs torch and numpy only.
#     bash Testing/benchmarks/on_gpu.sh OUTPUT_FOLDER [FOLDER_WITH_THE_PEERS_SOURCES]
set -uo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH=. PYTHONUNBUFFERED=1
out=${1:?give a folder for the results}
mkdir -p "$out"
peer=(--without-peer)
[ $# -gt 1 ] && peer=(--peer "$2")
step() {
    local name=$1
    shift
    timeout 70 python3 Testing/benchmarks/io_step.py --device cuda --repeats 5 --json "$out/$name.json" "$@"
}
timeout 50 python3 Testing/benchmarks/same_on_gpu.py --device cuda | tee "$out/same_on_gpu.txt"
step full --lattice 175 "${peer[@]}"
step lean --lattice 175 --memory lean --without-peer
step exact --lattice 175 --precision exact --without-peer
step compact --lattice 96 112 80 --model compact --without-peer
timeout 60 python3 Testing/benchmarks/fifty_steps.py --device cuda --json "$out/fifty_steps.json"
timeout 60 python3 Testing/benchmarks/refinement_step.py --device cuda --json "$out/refinement_step.json" | tee "$out/refinement_step.txt"
