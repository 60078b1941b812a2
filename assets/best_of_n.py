"""Best of n: a policy's answer that the reward model, or gold, likes best, in Markdown.

    python assets/best_of_n.py --out out --model ppo_init --samples 64

Expectations over all choices of n of the samples, so each n uses all of them. The KL of best of n
from the policy is at most log n - (n - 1) / n (Gao et al. 2022). Reads validation prompts.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # to find rlhf.py
import rlhf  # noqa: E402
from data import fable, files  # noqa: E402
from model import ScalarModel  # noqa: E402


def expected_best(key: np.ndarray, value: np.ndarray, n: int) -> float:
    """The mean value of the highest key among n of S samples: (S, N), (S, N) -> ()."""
    samples = len(key)
    ordered = np.take_along_axis(value, key.argsort(0), 0)
    chances = []  # the sample of rank i, from 0, is the best: the other n - 1 rank lower
    for i in range(samples):
        chances.append(math.comb(i, n - 1) / math.comb(samples, n))
    return float((np.array(chances)[:, None] * ordered).sum(0).mean())


def sample(cfg: rlhf.Evaluate, model: str, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The reward model's scores and gold, each (samples, prompts)."""
    tokenizer = files.get_tokenizer(cfg.data)
    policy = rlhf.load(cfg, model)
    reward_model = rlhf.load(cfg, cfg.reward_model, ScalarModel)
    longest = rlhf.longest_prompt([policy, reward_model], cfg)
    rows = files.read_prompts(Path(cfg.data) / cfg.prompts, tokenizer, longest) * samples
    prompts = [row["prompt_ids"] for row in rows]
    torch.manual_seed(cfg.seed)
    responses = rlhf.complete(policy, prompts, tokenizer.eot_token, cfg.max_new_tokens)
    with torch.no_grad():
        scores = rlhf.score(reward_model, rlhf.behind(prompts, responses), cfg).numpy()
    texts = [files.decode(tokenizer, response) for response in responses]
    gold = [sum(fable.gold(row, text).values()) for row, text in zip(rows, texts)]
    return scores.reshape(samples, -1), np.array(gold).reshape(samples, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="out", help="folder of a run of train.sh")
    parser.add_argument("--model", default="ppo_init", help="the policy")
    parser.add_argument("--reward_model", default="rm", help="the reward model")
    parser.add_argument("--samples", type=int, default=64, help="responses to each prompt")
    flags = parser.parse_args()
    cfg = rlhf.Evaluate(data=f"{flags.out}/data", out=flags.out, device="cpu",
                        reward_model=flags.reward_model)
    scores, gold = sample(cfg, flags.model, flags.samples)
    table = {}
    for n in (2 ** i for i in range(flags.samples.bit_length())):
        table[f"best of {n}"] = {
            "KL": math.log(n) - (n - 1) / n, "RM score": expected_best(scores, scores, n),
            "gold": expected_best(scores, gold, n), "gold, chosen by gold": expected_best(gold, gold, n)
        }
    print(rlhf.markdown(table))


if __name__ == "__main__":
    main()
