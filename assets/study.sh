#!/usr/bin/env bash
# Every run behind the README's numbers and assets/study.md, for one seed: assets/study.sh 11
# ABLATIONS=1 adds the runs that vary one thing at a time. All of it goes into out/study/SEED.
set -euo pipefail
cd "$(dirname "$(readlink -f "$0")")/.."
seed=$1
out=out/study/$seed
SEED=$seed OUT=$out RESUME=1 ./train.sh

run=(--data "$out/data" --out "$out" --seed "$seed")
train() { python3 rlhf.py "$1" "${run[@]}" --resume "${@:2}"; }
evaluate() { python3 rlhf.py evaluate "${run[@]}" --prompts prompts_test.jsonl "$@"; }

train ppo --name ppo --ptx_coef 0 # without pretraining text: the alignment tax
train dpo
few=$out/few # over-optimisation (Gao et al. 2022): a reward model from an eighth of the rankings
mkdir -p "$few" && cp "$out"/data/*.* "$few"
head -n 384 "$out/data/comparisons.jsonl" > "$few/comparisons.jsonl"
train rm --name rm_384 --init sft0 --data "$few"
if [ -n "${ABLATIONS:-}" ]; then
    for kl in 0 0.04 0.64; do # Figure 34 of the paper: no KL coefficient cures the tax
        train ppo --name "kl_$kl" --kl_coef $kl --ptx_coef 0
        train ppo --name "ptx_kl_$kl" --kl_coef $kl
    done
    for ptx in 0.1 2; do train ppo --name "ptx_$ptx" --ptx_coef $ptx; done # Figure 33: ptx does
    for beta in 0.3 3; do train dpo --name "dpo_$beta" --beta $beta; done
    second=$out/second # steps 2 and 3 again, with rankings of what PPO-ptx writes, too
    mkdir -p "$second" && cp "$out"/data/*.* "$second"
    python3 data/label.py "${run[@]}" --data "$second" --round 2 --models ppo_ptx
    train rm --name rm2 --data "$second"
    train ppo --name ppo_ptx2 --reward_model rm2
    evaluate --name ablations --samples 4 --models \
        kl_0,ptx_kl_0,kl_0.04,ptx_kl_0.04,kl_0.64,ptx_kl_0.64,ptx_0.1,ptx_2,dpo_0.3,dpo_3,ppo_ptx2
fi
evaluate --name temperature_1.0 --samples 4 \
    --models gpt,gpt+fewshot,sft,ppo_init,dpo,ppo,ppo_ptx_raw,ppo_ptx
evaluate --name temperature_0.7 --models gpt,gpt+fewshot,sft,ppo,dpo,ppo_ptx --temperature 0.7
evaluate --name greedy --models gpt,sft,ppo_ptx --temperature 0
for model in rm rm_384; do # over-optimisation, beyond the list of what the final runs report
    evaluate --name "best_of_n_$model" --models ppo_init --reward_model $model --samples 64 \
        --prompts prompts_valid.jsonl
done

patched=$out/best_of_n # what the reward model likes best of eight samples of PPO's start
mkdir -p "$patched" && cp -r rlhf.py model.py parallel.py data "$patched"
(cd "$patched" && patch -s -p1) < patches/variants/best-of-n.patch
python3 "$patched/rlhf.py" evaluate "${run[@]}" --prompts prompts_test.jsonl --name best_of_8 \
    --models ppo_init --best_of 8
