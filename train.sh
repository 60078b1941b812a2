#!/usr/bin/env bash
# The whole of InstructGPT, from random weights, on two CPU cores.
#
#   ./train.sh                            everything below, into out/
#   SMOKE=1 ./train.sh                    the same path on a twentieth of the data, to see that it runs
#   SEED=2 OUT=out/seed2 ./train.sh       another seed, into a folder of its own
set -euo pipefail
cd "$(dirname "$0")"

if [ -d .venv ]; then source .venv/bin/activate; fi
if ! python3 -c "import torch, tiktoken, tqdm" 2> /dev/null; then
    python3 -m venv .venv
    source .venv/bin/activate
    pip install -q -r requirements.txt
fi

OUT=${OUT:-out}
all="--data $OUT/data --seed ${SEED:-1}"
run="$all --out $OUT"
small() { if [ -n "${SMOKE:-}" ]; then echo "$@"; fi; } # flags of the smoke run alone

# The minutes beside each step are those of seed 3, beside two other runs on two cores, a thread each.

# A world, its customers and its labelers                                            0.1 minutes
python3 data/prepare.py fable $all $(small --scale 0.05)
# GPT: next-token prediction                                                        11.5
python3 rlhf.py pretrain $run $(small --steps 60)
# Step 1: imitate the demonstrations                                                 1.3
python3 rlhf.py sft $run $(small --epochs 2)
# Step 2: the labelers rank what it writes; learn to rank as they do                 3.3 and 2.9
python3 data/label.py $run
python3 rlhf.py rm $run
# Step 1 again: the same training, keeping the epoch that the reward model likes     1.3
python3 rlhf.py sft $run $(small --epochs 2) --reward_model rm
# Step 3: PPO starts from an SFT with a tenth of pretraining text mixed in    0.5
python3 rlhf.py sft $run $(small --epochs 2) --name ppo_init --pretrain_fraction 0.1
#         without pretraining text, then with it                                     5.1 and 7.1
python3 rlhf.py ppo $run $(small --iterations 4) --name ppo --ptx_coef 0
python3 rlhf.py ppo $run $(small --iterations 4)
# What each of them did                                                              0.9
python3 rlhf.py evaluate $run
