#!/usr/bin/env bash
# The whole of InstructGPT.
#
#   ./train.sh                            from random weights, on two CPU cores, into out/
#   SMOKE=1 ./train.sh                    the same path on a twentieth of the data, to see that it runs
#   SEED=2 OUT=out/seed2 ./train.sh       another seed, into a folder of its own
#   RESUME=1 ./train.sh                   go on where it was stopped, to the same bits
#   ROUNDS=2 ./train.sh                   then steps 2 and 3 again, with rankings of the new policy
#   OUT=out/gpt2 ./train.sh gpt2          from GPT-2's weights, on people's rankings, on one GPU
#   MODEL=gpt2-xl FEEDBACK=hh OUT=out/xl ./train.sh gpt2
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
train="$run ${RESUME:+--resume}"
small() { if [ -n "${SMOKE:-}" ]; then echo "$@"; fi; } # flags of the smoke run alone

# The minutes beside each step are measured: README, "How long it takes".
fable() {
    # A world, its customers and its labelers                                           0.1 minutes
    python3 data/prepare.py fable $all $(small --scale 0.05)
    # GPT: next-token prediction                                                        2.8
    python3 rlhf.py pretrain $train $(small --steps 60)
    # Step 1: imitate the demonstrations                                                0.4
    python3 rlhf.py sft $train $(small --epochs 2) --name sft0
    # Step 2: the labelers rank what it writes; learn to rank as they do                0.9 and 1.3
    python3 data/label.py $run --models sft0,sft0,sft0,sft0,gpt
    python3 rlhf.py rm $train --init sft0
    # Step 1 again: the same training, keeping the epoch that the reward model likes    0.3
    python3 rlhf.py sft $train $(small --epochs 2) --reward_model rm
    # Step 3: PPO starts from an SFT with a tenth of pretraining text mixed in          0.6
    python3 rlhf.py sft $train $(small --epochs 2) --name ppo_init --pretrain_fraction 0.1
    #         without pretraining text, then with it                                    1.4 and 1.8
    python3 rlhf.py ppo $train $(small --iterations 4) --name ppo --ptx_coef 0
    python3 rlhf.py ppo $train $(small --iterations 4)
    # Steps 2 and 3 again, if asked: what the newest policy writes is ranked as well, a reward model
    # learns from all rankings so far, and PPO begins anew with it
    models=gpt,gpt+fewshot,sft,ppo,ppo_ptx newest=ppo_ptx
    for round in $(seq 2 "${ROUNDS:-1}"); do
        python3 data/label.py $run --round $round --models $newest
        python3 rlhf.py rm $train --name rm$round
        newest=ppo_ptx$round models=$models,ppo_ptx$round
        python3 rlhf.py ppo $train $(small --iterations 4) --name $newest --reward_model rm$round
    done
    # What each of them did                                                             0.3
    python3 rlhf.py evaluate $run --models $models
}

# Rates are the paper's, times how much higher GPT-3's own rate was at 125M (6e-4) than at the paper's
# size: 3 times for the policy (1.3B, 2e-4), 5 times for reward and value (6B, 1.2e-4); PPO's, which
# the paper swept, is our choice. Not yet run on a GPU: neither minutes nor memory are known.
gpt2() {
    python3 data/prepare.py ${FEEDBACK:-oasst} $all
    python3 data/prepare.py webtext $all
    python3 data/gpt2.py load ${MODEL:-gpt2} --out $OUT
    run="$run --max_new_tokens 256 --microbatch_size ${MICROBATCH:-8}"
    train="$run ${RESUME:+--resume}"
    sft="python3 rlhf.py sft $train --learning_rate 3e-5 --epochs 3"
    ppo="python3 rlhf.py ppo $train --learning_rate 1e-5 --value_learning_rate 4.5e-5 --kl_coef 0.02"
    $sft
    python3 rlhf.py rm $train --learning_rate 4.5e-5 --epochs 1 --batch_size 32 # people have ranked already
    $sft --name ppo_init --pretrain_fraction 0.1
    $ppo --name ppo --ptx_coef 0 $(small --iterations 2)
    $ppo $(small --iterations 2)
    python3 rlhf.py evaluate $run
}

case ${1:-fable} in
    fable | gpt2) ${1:-fable} ;;
    *) echo "./train.sh fable or ./train.sh gpt2, not $1" >&2 && exit 2 ;;
esac
