"""GPT-2, its twin with a scalar for a head, and how to sample. Nothing here knows of training.

The architecture is GPT-2's to the letter (Radford et al. 2019; InstructGPT's is larger): learned
positions, LayerNorm with bias before each sublayer and at the end, tanh GELU, an unembedding tied
to the token embedding. A row of tokens is prompt, response, padding: as no token sees what stands
to its right, padding on the right changes nothing, and where it is known costs nothing.

In shapes: B rows, T columns, N tokens that are no padding, M of them wanted, C width (n_embd),
H heads (n_head), D = C / H, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

@dataclass
class GPTConfig:
    """The shape of a GPT: about 12 n_layer n_embd^2 + V n_embd parameters."""
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    block_size: int = 1024  # longest row, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on the residual branches only, as in InstructGPT's SFT (C.1: 0.2)
    vocabulary: str = ""  # the fingerprint of whose tokens it reads, if known

# GPT-1: gpt2 with a context of 512, each LayerNorm after its sublayer. GPT-3 6B, InstructGPT's
# reward model: 32 layers, 32 heads, width 4096; GPT-3 175B: 96, 96 and 12288; context 2048.
PRESETS = {
    "fable": dict(block_size=256, n_layer=4, n_head=4, n_embd=128),  # about 1M, from nothing
    "fable-10x": dict(block_size=256, n_layer=8, n_head=10, n_embd=320),  # about 10M
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1.56B, InstructGPT's smallest was 1.3B
}

class KVCache:
    """Keys and values of the tokens read so far, with one write position per row.

    A prompt's padding is written too, and overwritten later: no row looks beyond its own position.
    """
    def __init__(self, batch: int, device: torch.device):
        self.layers = {}  # layer -> keys and values (2, B, H, width, D)
        self.width = 0  # the columns there are, which attention looks at: it may be set, to grow
        self.position = torch.zeros(batch, dtype=torch.long, device=device)  # next column, by row

    def update(self, layer: int, new: Tensor) -> Tensor:
        """Store new (B, T, 2, H, D) from each row's position on; returns all columns."""
        B, T, _, H, D = new.shape
        cached = self.layers.get(layer, new.new_zeros(2, B, H, 0, D))
        if missing := self.width - cached.size(3):  # products are fast on contiguous tensors alone
            cached = self.layers[layer] = F.pad(cached, (0, 0, 0, missing))
        rows = torch.arange(B, device=new.device)[:, None]
        columns = self.position[:, None] + torch.arange(T, device=new.device)
        cached[:, rows, :, columns] = new
        return cached

    def keep(self, alive: Tensor) -> None:
        """Drop all other rows, so that a response that has ended costs nothing more."""
        self.position = self.position[alive]
        self.layers = {layer: cached[:, alive] for layer, cached in self.layers.items()}

class Rows(NamedTuple):
    """Where tokens stand. Most of the work is on each token by itself and reads them side by side,
    (N, C), so that padding costs nothing. Attention reads groups of rows of like length, padded to
    their longest, P places together. An index that is None leaves everything where it is.

    Of rows "cdef" and "ab.." the tokens are a b c d e f, the places of their group, were lengths
    not rounded, ab..cdef: cells 4 5 0 1 2 3, fill 0 1 1 1 2 3 4 5, places 0 1 4 5 6 7.
    """
    groups: list[tuple]  # rows, columns and mask of each group
    cells: Tensor | None = None  # (N,) the cell of (B, T) that each token comes from
    fill: Tensor | None = None  # (P,) the token that each place holds; padding holds any
    places: Tensor | None = None  # (N,) or (M,) the place of each token that goes on
    kept: Tensor | None = None  # (M,) the tokens that go on after attention

def take(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows of x that the index names."""
    return x if index is None else x.index_select(0, index)

def causal(position: Tensor, width: int) -> Tensor:
    """-inf where a column is to the right of the position, else 0: (B, T) -> (B, 1, T, width)."""
    unseen = torch.arange(width, device=position.device) > position[:, None, :, None]
    return torch.zeros_like(unseen, dtype=torch.float).masked_fill(unseen, -torch.inf)

def like_lengths(rows, lens: list[int]) -> list[list[int]]:
    """Rows in groups of like length: halved while that saves 256 places (64 to 1,024: as fast)."""
    rows = sorted(rows, key=lambda i: lens[i])
    half = len(rows) // 2
    if half * (lens[rows[-1]] - lens[rows[half - 1]]) <= 256:
        return [rows]
    return like_lengths(rows[:half], lens) + like_lengths(rows[half:], lens)

def ragged(wanted: Tensor) -> tuple[Rows, Rows]:
    """For all blocks but the last, and for the last, after whose attention only those tokens go on
    whose states are wanted, (B, T) bool; what stands to the right of them is padding."""
    (B, T), device = wanted.shape, wanted.device
    lens = (wanted * torch.arange(1, T + 1, device=device)).amax(1).clamp(min=1)
    lengths, groups, cells = lens.tolist(), [], []
    for part in [range(B)] if wanted.is_cuda else like_lengths(range(B), lengths):
        row = torch.tensor(part, device=device)[:, None]
        column = torch.arange(multiple(max(lengths[i] for i in part)), device=device)
        groups.append((len(row), len(column), causal(column[None], len(column))))
        cells.append(torch.where(column < lens[row], row * T + column, -1).flatten())
    cells = torch.cat(cells)  # of each place, -1 for padding
    places = (cells >= 0).nonzero().squeeze(1)
    tokens = cells.new_zeros(B * T)  # the token in each cell
    tokens[cells[places]] = torch.arange(len(places), device=device)
    kept, places = (  # longer by copies that nobody reads: few different shapes
        F.pad(x, (0, multiple(len(x), 64) - len(x))) for x in (tokens[wanted.flatten()], places))
    rows = Rows(groups, cells[places], (cells >= 0).cumsum(0) - 1, places)
    return rows, rows._replace(places=places[kept], kept=kept)

def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + mask) v: (B, H, T, D), twice (B, H, S, D), (1 or B, 1, T, S)."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))
    B, H, T, D = q.shape  # the fused kernel for CPUs is 4 times slower at these widths in bfloat16
    bias = mask[0] if len(mask) == 1 else mask.expand(B, H, T, -1).flatten(0, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=D**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(B, H, T, D)

class Attention(nn.Module):
    """Causal self-attention, all heads at once: (N, C) -> (N, C), or (M, C)."""
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer, self.n_head = layer, config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x: Tensor, rows: Rows, cache: KVCache | None = None) -> Tensor:
        heads, read = take(self.c_attn(x), rows.fill), []
        sizes = [B * T for B, T, _ in rows.groups]
        for own, (B, T, mask) in zip(heads.split(sizes), rows.groups):
            own = own.view(B, T, 3, self.n_head, -1)
            q, k, v = own.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
            if cache is not None:
                k, v = cache.update(self.layer, own[:, :, 1:])
            read.append(attend(q, k, v, mask).transpose(1, 2).reshape(B * T, -1))
        return self.c_proj(take(torch.cat(read), rows.places))

class MLP(nn.Module):
    """Of each token by itself, four times as wide between: (N, C) -> (N, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.gelu(self.c_fc(x)))

class Block(nn.Module):
    """Attention, then MLP, each added to what it read: (N, C) -> (N, C), or (M, C)."""
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rows: Rows, cache: KVCache | None = None) -> Tensor:
        x = take(x, rows.kept) + self.dropout(self.attn(self.ln_1(x), rows, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))

class GPT(nn.Module):
    """A language model: tokens (B, T) -> logits (B, T, V) of the token that follows each."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.dim() == 2:  # N(0, 0.02), less where 2 n_layer branches add up (GPT-2, 2.3)
                branch = (2 * config.n_layer) ** -0.5 if "c_proj" in name else 1
                nn.init.normal_(weight, std=0.01 if name == "wpe.weight" else 0.02 * branch)

    def hidden(self, tokens: Tensor, wanted: Tensor | None = None, cache=None) -> Tensor:
        """States after the final LayerNorm, (B, T) -> (B, T, C); only padding may be over-long.

        Where some are `wanted`, (B, T) bool: only they, (M, C), row by row, and perhaps a few more.
        """
        (B, T), width = tokens.shape, tokens.size(1) if cache is None else cache.width
        past = tokens.new_zeros(1) if cache is None else cache.position  # read before, by row
        position = past[:, None] + torch.arange(T, device=tokens.device)
        whole = wanted is None
        rows, last = [Rows([(B, T, causal(position, width))])] * 2 if whole else ragged(wanted)
        position = position.clamp(max=self.config.block_size - 1).expand(B, T)
        ids, position = (take(x.flatten(), rows.cells) for x in (tokens, position))
        x = self.wte(ids) + self.wpe(position)
        for block in self.h:
            x = block(x, last if block is self.h[-1] else rows, cache)
        return self.ln_f(x.view(B, T, -1) if whole else x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """States (..., C) -> logits (..., V); apart, as few columns need their logits."""
        return F.linear(hidden, self.wte.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.hidden(tokens))

class ScalarModel(nn.Module):
    """A GPT with one number in place of its logits: tokens (B, T) -> (B, T).

    The reward model reads it at a row's last token, the value network, its copy, at every token.
    The head starts from N(0, 1 / (C + 1)) as in OpenAI's code of 2019; the paper does not say.
    """
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.head.weight, std=(config.n_embd + 1) ** -0.5)
        nn.init.zeros_(self.head.bias)
        # the lowest and the highest score that it gave in its training, once known
        self.register_buffer("score_range", torch.tensor([-torch.inf, torch.inf]))

    def forward(self, tokens: Tensor, wanted: Tensor | None = None) -> Tensor:
        """All numbers; or those that are wanted, (B, T) bool, and elsewhere 0."""
        wanted = torch.ones_like(tokens) > 0 if wanted is None else wanted
        states = self.gpt.hidden(tokens, wanted).float()
        numbers = (states * self.head.weight[0]).sum(-1) + self.head.bias  # autocast would round @
        return torch.zeros_like(wanted, dtype=torch.float).masked_scatter(wanted, numbers)

def multiple(n: int, of: int = 8) -> int:
    """n rounded up: with few different shapes, few matrix products have to be compiled for."""
    return -(-n // of) * of

def pad_right(rows: list[list[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Ragged lists of ids -> tokens (B, T), lens (B,). What fills the padding does not matter."""
    lens = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), multiple(int(lens.max())), dtype=torch.long)
    for row, ids in zip(tokens, rows):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.long)
    return tokens.to(device), lens.to(device)

def sample(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """One token a row from softmax(logits / temperature), at 0 the likeliest: (B, V) -> (B,).

    Inverts the cumulative distribution at one uniform number a row. No top-k, no top-p: what is
    sampled has to be the very distribution that the log-probabilities are of.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cdf = F.softmax(logits.float() / temperature, dim=-1).cumsum(-1)
    uniform = torch.rand(len(cdf), 1, device=cdf.device) * cdf[:, -1:]
    return torch.searchsorted(cdf, uniform, right=True)[:, 0].clamp(max=logits.size(-1) - 1)

def captured(step, token: Tensor):
    """`step` as a CUDA graph: its hundreds of kernels, recorded once, cost one launch a replay."""
    fixed, graph, side = token.clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # once for real, as libraries set themselves up on first use
        step(fixed)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        state = step(fixed)

    def replay(token: Tensor) -> Tensor:
        fixed.copy_(token)
        graph.replay()
        return state

    return replay

@torch.no_grad()
def stream(model: GPT, prompts: list[list[int]], max_new_tokens: int, eos: int, temperature=1.0):
    """Decode step by step: yields the rows still going and the next token of each, EOS last."""
    tokens, lens = pad_right(prompts, model.wte.weight.device)
    if lens.min() < 1 or lens.max() + max_new_tokens > model.config.block_size:
        need = f"at least 1, and with {max_new_tokens} new ones at most {model.config.block_size}"
        raise ValueError(f"prompts of {lens.min()} to {lens.max()} tokens: they need {need}")
    rows = torch.arange(len(tokens), device=tokens.device)
    alive = torch.ones_like(rows, dtype=torch.bool)
    cache = KVCache(len(rows), tokens.device)

    def step(token: Tensor) -> Tensor:
        return model.hidden(token[:, None], cache=cache)[:, 0]

    cache.width = tokens.size(1)
    state = model.hidden(tokens, cache=cache)[rows, lens - 1]
    cache.position = lens.clone()
    for i in range(max_new_tokens):
        token = sample(model.unembed(state), temperature)
        yield rows[alive], token[alive]
        alive = alive & (token != eos)
        if i + 1 == max_new_tokens or not alive.any():
            return
        if token.is_cuda:  # a launch costs more than what rows that have ended or columns cost
            cache.width = multiple(tokens.size(1) + max_new_tokens)
            step = captured(step, token) if i == 0 else step
        else:
            cache.width = multiple(int(lens.max()) + i + 1)
            if alive.sum() <= 0.8 * len(alive):  # often enough to save work, but to copy little
                cache.keep(alive)
                rows, token, alive = rows[alive], token[alive], alive[alive]
        state = step(token)
        cache.position += 1

def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, eos: int, temperature=1.0):
    """Complete every prompt, up to its EOS or max_new_tokens.

    Returns tokens (B, T), prompt_lens (B,) and total_lens (B,), which counts prompt, response and
    EOS, if one was met. Raises ValueError if a row cannot fit the context.
    """
    tokens, prompt_lens = pad_right(prompts, model.wte.weight.device)
    tokens = F.pad(tokens, (0, max_new_tokens))
    total_lens = prompt_lens.clone()
    for rows, token in stream(model, prompts, max_new_tokens, eos, temperature):
        tokens[rows, total_lens[rows]] = token
        total_lens[rows] += 1
    return tokens[:, : total_lens.max()], prompt_lens, total_lens
