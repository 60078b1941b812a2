"""train.sh from a user's own preference pairs, with a tiny model in the place of GPT-2."""

import base64
import json
import os
import subprocess
import sys

import torch
from conftest import ROOT

from data.files import fingerprint, get_tokenizer
from data.gpt2 import save_gpt2
from model import GPT, GPTConfig

def test_pairs_alone_are_enough(tmp_path):
    """FEEDBACK="mine pairs.jsonl" ./train.sh gpt2 ends in a table, from a folder with a blank."""
    data = tmp_path / "my out" / "data"
    data.mkdir(parents=True)
    bytes_ = [f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256)]
    (data / "tokenizer.tiktoken").write_text("".join(bytes_))
    tokenizer = get_tokenizer(str(data))
    torch.manual_seed(0)
    shape = dict(block_size=64, n_layer=1, n_head=2, n_embd=16)
    save_gpt2(GPT(GPTConfig(257, **shape, vocabulary=fingerprint(tokenizer))), tmp_path / "tiny")
    pairs = []
    for i in range(60):
        pairs.append({"prompt": f"Add {i}.", "chosen": f"{i}", "rejected": "No, you."})
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    (tmp_path / "link.sh").symlink_to(ROOT / "train.sh")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(sys.executable)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "FEEDBACK": "mine pairs.jsonl",
        "OUT": "my out", "MODEL": "tiny", "MAX_NEW_TOKENS": "8", "MICROBATCH": "16", "SMOKE": "1",
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(["bash", "link.sh", "gpt2"], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| ppo_ptx |" in done.stdout
    assert (tmp_path / "my out" / "ppo_ptx.pt").exists()
