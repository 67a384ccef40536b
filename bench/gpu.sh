#!/usr/bin/env bash
# Every way through vLLM, and the torch engine, on a model of random weights; a table at the end.
#   bench/gpu.sh [8b|1b|tiny] [prompts in a round]      PYTHON=… VLLM_ARGS='{"…": …}' ROUNDS=3 WAYS="torch"
# Needs a GPU and, but for the way torch, an environment with constraints/vllm.txt; the shape 8b takes 16 GB
# of disk below TMPDIR. Without a GPU it is a dry run: PYTHON=.venv-vllm/bin/python bench/gpu.sh tiny 40
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
shape=${1:-8b}
prompts=${2:-2000}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m bench.gpu model --model "$folder/model" --shape "$shape"
"$python" -m bench.gpu peak | tee "$folder/results"
# A process each: what one leaves in the GPU's memory is not there for the next.
for way in ${WAYS:-vllm engine worker stack torch}; do
  "$python" -m bench.gpu "$way" --model "$folder/model" --prompts "$prompts" --rounds "${ROUNDS:-3}" \
    --vllm-args "${VLLM_ARGS:-{\}}" | tee "$folder/out"
  grep '^{"way"' "$folder/out" >> "$folder/results"
done
"$python" -m bench.gpu report --results "$folder/results"
