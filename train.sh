#!/usr/bin/env bash
# The whole of InstructGPT.
#
#   ./train.sh                            from random weights, on two CPU cores, into out/
#   SMOKE=1 ./train.sh                    the same path on a twentieth of the data, in a minute or two
#   SEED=2 OUT=out/seed2 ./train.sh       another seed, into a folder of its own
#   RESUME=1 ./train.sh                   go on where it was stopped
#   ROUNDS=2 ./train.sh                   then steps 2 and 3 again, with rankings of the new policy
#   OUT=out/gpt2 ./train.sh gpt2          from GPT-2's weights, on people's rankings, on one GPU
#   FEEDBACK="mine pairs.jsonl" OUT=out/mine ./train.sh gpt2          on your own preferences
set -euo pipefail
root=$(dirname "$(readlink -f "$0")")

if [ -f "$root/.venv/bin/activate" ]; then source "$root/.venv/bin/activate"; fi
if ! python3 -c "import numpy, torch, tiktoken, tqdm" 2> /dev/null; then
    python3 -m venv "$root/.venv"
    source "$root/.venv/bin/activate"
    pip install -q -r "$root/requirements.txt"
fi

out=${OUT:-out}
data=(--data "$out/data" --seed "${SEED:-1}")
run=("${data[@]}" --out "$out")
smoke() { if [ -n "${SMOKE:-}" ]; then echo "$@"; fi; } # flags of the smoke run alone
prepare() { python3 "$root/data/prepare.py" "$@"; }
label() { python3 "$root/data/label.py" "${run[@]}" "$@"; }
train() { python3 "$root/rlhf.py" "$1" "${run[@]}" ${RESUME:+--resume} "${@:2}"; }
evaluate() { python3 "$root/rlhf.py" evaluate "${run[@]}" "$@"; }

fable() {
    prepare fable "${data[@]}" $(smoke --scale 0.05)      # the world, its customers and labelers
    train pretrain $(smoke --steps 60)                    # GPT: next-token prediction
    train sft $(smoke --epochs 2) --name sft0             # step 1: imitate the demonstrations
    label --models sft0,sft0,sft0,sft0,gpt                # step 2: labelers rank what it writes,
    train rm --init sft0                                  #         and a model learns their order
    train sft $(smoke --epochs 2) --reward_model rm       # step 1 again: keep the best epoch
    train sft $(smoke --epochs 2) --name ppo_init --pretrain_fraction 0.1 # where step 3 starts
    train ppo $(smoke --iterations 4)                     # step 3: PPO with pretraining text
    models=gpt,gpt+fewshot,sft,ppo_init,ppo_ptx newest=ppo_ptx
    for ((round = 2; round <= ${ROUNDS:-1}; round++)); do # rank anew, train on all rankings
        label --round "$round" --models "$newest"
        train rm --name "rm$round"
        newest=ppo_ptx$round models=$models,ppo_ptx$round
        train ppo $(smoke --iterations 4) --name "$newest" --reward_model "rm$round"
    done
    evaluate --models "$models"
}

# The paper's learning rates, times how much higher GPT-3's own was at 125M than at the paper's size: 3
# for policies (1.3B), 5 for scalar models (6B). PPO's policy: our choice of those swept, 2.6e-6 to 2.6e-5.
gpt2() {
    eval "feedback=(${FEEDBACK:-oasst})" # words; a name with a blank is in quotes
    prepare "${feedback[@]}" "${data[@]}"
    if [ "${feedback[0]}" != mine ]; then prepare webtext "${data[@]}"; fi
    python3 "$root/data/gpt2.py" load "${MODEL:-gpt2}" --out "$out" --data "$out/data"
    run+=(--max_new_tokens "${MAX_NEW_TOKENS:-256}" --microbatch_size "${MICROBATCH:-8}")
    fraction=0.1 ptx_coef=0.5
    if [ ! -f "$out/data/pretrain.txt" ]; then fraction=0 ptx_coef=0; fi # no text for the ptx term
    train sft --learning_rate 3e-5 --epochs 3
    train rm --learning_rate 4.5e-5 --epochs 1 --batch_size 32
    train sft --learning_rate 1.5e-5 --epochs 2 --name ppo_init --pretrain_fraction $fraction
    train ppo --learning_rate 1e-5 --value_learning_rate 4.5e-5 --kl_coef 0.02 \
        --ptx_coef $ptx_coef $(smoke --iterations 2 --rollout_size 16 --minibatch_size 8)
    evaluate
}

case ${*:-fable} in
    fable | gpt2) ${1:-fable} ;;
    *) echo "train.sh takes fable or gpt2, not $*; settings go before it: MODEL=gpt2-xl ./train.sh gpt2" >&2 && exit 2 ;;
esac
