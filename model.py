"""GPT-2, its twin with a scalar head, and sampling with a KV cache. Nothing here is about training.

The architecture is GPT-2's (Radford et al. 2019). Rows are padded on the right: attention is
causal, so right padding never affects real tokens.

Shapes: B rows, T columns, C width (n_embd), H heads, D = C / H, V vocabulary, L layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

@dataclass
class GPTConfig:
    """The shape of a GPT: about 12 L C^2 + V C parameters."""
    vocab_size: int = 50257  # 256 bytes + 50,000 merges + <|endoftext|>
    block_size: int = 1024  # the longest row, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0  # on the residual branches only, as in InstructGPT's SFT (C.1)
    vocabulary: str = ""  # hash of the tokenizer it was trained with, if known

PRESETS = {
    "fable": dict(block_size=256, n_layer=4, n_head=4, n_embd=128),  # 1M
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1.56B
}

class KVCache:
    """Keys and values of the tokens read so far, so that each is computed only once.

    The prompts are read first, padded to one width; then all rows write to the same column. A
    short prompt leaves a gap of padding before its response, which `mask` hides from attention.
    """
    def __init__(self, prompt_lens, width, max_new_tokens):
        columns = torch.arange(width + max_new_tokens, device=prompt_lens.device)
        self.max_new_tokens = max_new_tokens
        self.layers = {}  # layer -> keys and values (2, B, H, columns, D)
        self.mask = (columns < prompt_lens[:, None])[:, None, None]  # (B, 1, 1, columns)
        self.position = prompt_lens[:, None] - 1  # (B, 1) of the last token read
        self.column = columns[width - 1 : width]  # the last one written

    def next_token(self):
        """Make room for each row's next token, in place, as a CUDA graph requires."""
        self.position += 1
        self.column += 1
        self.mask.index_fill_(3, self.column, True)

    def append(self, layer, keys_values):
        """Store keys and values (2, B, H, T, D); returns those to attend to, and the mask."""
        if layer not in self.layers:  # the prompts: causal attention needs no mask
            self.layers[layer] = F.pad(keys_values, (0, 0, 0, self.max_new_tokens))
            return keys_values, None
        return self.layers[layer].index_copy_(3, self.column, keys_values), self.mask

    def keep(self, rows: Tensor):
        """Drop all other rows, so that a response that has ended costs nothing more."""
        self.mask = self.mask[rows]
        self.position = self.position[rows]
        for layer, keys_values in self.layers.items():
            self.layers[layer] = keys_values[:, rows]

class Attention(nn.Module):
    """Causal self-attention: (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.c_attn = nn.Linear(C, 3 * C)
        self.c_proj = nn.Linear(C, C)

    def forward(self, x, cache, layer):
        B, T, C = x.shape
        D = C // self.n_head
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D)
        qkv = qkv.permute(2, 0, 3, 1, 4)  # (3, B, H, T, D)
        if x.is_cpu:  # where attention is slower in bfloat16
            qkv = qkv.float()
        mask = None
        q, k, v = qkv
        if cache is not None:
            keys_values, mask = cache.append(layer, qkv[1:])
            k, v = keys_values
        with torch.autocast("cpu", enabled=False):
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.c_proj(y)

class MLP(nn.Module):
    """Per-token network with hidden width 4C: (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.c_fc = nn.Linear(C, 4 * C)
        self.gelu = nn.GELU(approximate="tanh")
        self.c_proj = nn.Linear(4 * C, C)

    def forward(self, x):
        return self.c_proj(self.gelu(self.c_fc(x)))

class Block(nn.Module):
    """Attention, then MLP, each added to its input: (B, T, C) -> (B, T, C)."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache, layer):
        x = x + self.dropout(self.attn(self.ln_1(x), cache, layer))
        return x + self.dropout(self.mlp(self.ln_2(x)))

class GPT(nn.Module):
    """A language model: tokens (B, T) -> logits (B, T, V) for the token after each."""
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)  # as in GPT-2's code
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)  # 2 L branches add up (GPT-2, 2.3)
        for block in self.h:
            nn.init.normal_(block.attn.c_proj.weight, std=residual_std)
            nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)

    def hidden(self, tokens: Tensor, cache=None) -> Tensor:
        """States after the final LayerNorm: (B, T) -> (B, T, C)."""
        positions = torch.arange(tokens.size(1), device=tokens.device)
        if cache is not None and cache.layers:
            positions = cache.position
        x = self.wte(tokens) + self.wpe(positions)
        for layer, block in enumerate(self.h):
            x = block(x, cache, layer)
        return self.ln_f(x)

    def unembed(self, states: Tensor) -> Tensor:
        """States (..., C) -> logits (..., V), float32. Separate: few columns need logits."""
        with torch.autocast(states.device.type, enabled=False):  # bfloat16 would round logits
            return F.linear(states.float(), self.wte.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.unembed(self.hidden(tokens))

class ScalarModel(nn.Module):
    """A GPT with a scalar head in place of its unembedding: tokens (B, T) -> (B, T), float32.

    The head starts from N(0, 1 / (C + 1)), as in OpenAI's code of 2019 (the paper is silent).
    """
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.gpt = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        head_std = 1 / math.sqrt(config.n_embd + 1)
        nn.init.normal_(self.head.weight, std=head_std)
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.gpt.hidden(tokens)
        with torch.autocast(tokens.device.type, enabled=False):
            return self.head(states.float()).squeeze(-1)

def pad_right(rows, device="cpu"):
    """Lists of token ids -> tokens (B, T), padded with 0 (any id would do), and lens (B,)."""
    lens = torch.tensor([len(row) for row in rows])
    tensors = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    return tokens.to(device), lens.to(device)

def sample(logits: Tensor, temperature: float = 1.0):
    """Draw tokens from softmax(logits / temperature): (B, V) -> tokens (B,), logprobs (B,).

    There is no top-k and no top-p: sampling must match the distribution we score. Looking up one
    uniform number in the cumulative distribution is faster than torch.multinomial, which draws V.
    """
    if temperature == 0:  # all probability is on the likeliest token
        token = logits.argmax(-1)
        return token, torch.zeros_like(token, dtype=torch.float)
    logprobs = F.log_softmax(logits / temperature, dim=-1)
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1:]  # 1, but for rounding
    uniform = total * torch.rand_like(total)
    token = torch.searchsorted(cumulative, uniform, right=True)
    token = token.clamp(max=logits.size(-1) - 1)  # rounding may put `uniform` at the very end
    logprob = logprobs.gather(1, token)
    return token.squeeze(1), logprob.squeeze(1)

def recorded(step, token: Tensor):
    """Record step(token) as a CUDA graph, which launches its hundreds of kernels at once."""
    try:
        return torch.cuda.make_graphed_callables(step, (token,))
    except RuntimeError as error:
        print(f"No CUDA graph, so decoding is slower: {error}")
        return step

@torch.no_grad()
def respond(model, prompts, max_new_tokens, eos, temperature=1.0):
    """Sample a response to each prompt (a list of ids), up to its EOS or max_new_tokens.

    Returns a pair for each: its ids and their log-probabilities. Raises ValueError if a
    prompt is empty or a row would exceed the context.
    """
    tokens, lens = pad_right(prompts, model.wte.weight.device)
    room = model.config.block_size - max_new_tokens
    if lens.min() < 1 or lens.max() > room:
        raise ValueError(f"prompts need 1 to {room} tokens, as {max_new_tokens} new ones follow")
    rows = torch.arange(len(prompts), device=tokens.device)  # the prompts still in the cache
    responses = torch.full((len(prompts), max_new_tokens), eos, device=tokens.device)
    logprobs = torch.zeros(responses.shape, device=tokens.device)
    cache = KVCache(lens, tokens.size(1), max_new_tokens)
    states = model.hidden(tokens, cache)[rows, lens - 1]
    going = torch.ones_like(rows, dtype=torch.bool)

    def step(token):
        return model.hidden(token[:, None], cache)[:, 0]

    for i in range(max_new_tokens):
        token, logprobs[rows, i] = sample(model.unembed(states), temperature)
        responses[rows, i] = token
        going = going & (token != eos)
        if i + 1 == max_new_tokens or not going.any():
            break
        if tokens.is_cpu and going.float().mean() <= 0.8:  # dropping rows copies the cache
            cache.keep(going)
            rows = rows[going]
            token = token[going]
            going = torch.ones_like(rows, dtype=torch.bool)
        cache.next_token()
        if tokens.is_cuda and i == 0:
            step = recorded(step, token.clone())
        states = step(token)
    sampled = []
    for ids, values in zip(responses.tolist(), logprobs.tolist()):
        if eos in ids:  # a row that has ended may have gone on sampling
            ids = ids[: ids.index(eos) + 1]
        sampled.append((ids, values[: len(ids)]))
    return sampled

def generate(model, prompts, max_new_tokens, eos, temperature=1.0):
    """The rows as tensors: tokens (B, T), prompt_lens (B,), total_lens (B,), EOS included."""
    rows = []
    sampled = respond(model, prompts, max_new_tokens, eos, temperature)
    for prompt, (ids, _) in zip(prompts, sampled):
        rows.append(prompt + ids)
    tokens, total_lens = pad_right(rows, model.wte.weight.device)
    prompt_lens = torch.tensor([len(prompt) for prompt in prompts], device=tokens.device)
    return tokens, prompt_lens, total_lens
