"""Byte-pair encoding: the vocabulary of a text, as tiktoken reads it."""

import base64
from collections import Counter

import regex  # comes with tiktoken

from data.formats import EOT, GPT2_SPLIT

VOCAB_SIZE = 1024


def train_bpe(text: str, vocab_size: int = VOCAB_SIZE) -> list[bytes]:
    """The 256 bytes, then merges of the most frequent pair; one place is left for <|endoftext|>."""
    counts = Counter()
    for part in text.split(EOT):
        counts.update(regex.findall(GPT2_SPLIT, part))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    vocab = [bytes([b]) for b in range(256)]
    pairs = pair_counts(words)
    while len(vocab) < vocab_size - 1 and pairs:
        # of two equally frequent pairs, the later in the alphabet
        pair = max(pairs, key=lambda p: (pairs[p], p))
        vocab.append(pair[0] + pair[1])
        touched = [i for i, (word, _) in enumerate(words) if pair in zip(word, word[1:])]
        pairs.subtract(pair_counts(words[i] for i in touched))
        for i in touched:
            words[i] = (merged(words[i][0], pair), words[i][1])
        pairs.update(pair_counts(words[i] for i in touched))
        pairs += Counter()  # drops the pairs that no word has any more
    vocab = list(dict.fromkeys(vocab))
    return vocab + fillers(vocab, vocab_size - 1 - len(vocab))


def pair_counts(words) -> Counter:
    pairs = Counter()
    for word, n in words:
        for pair in zip(word, word[1:]):
            pairs[pair] += n
    return pairs


def merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def fillers(vocab: list[bytes], count: int) -> list[bytes]:
    """A text with few words runs out of pairs: pairs of rare bytes keep the size as asked."""
    pairs = (bytes([a, b]) for a in range(255, 127, -1) for b in range(255, 127, -1))
    return [pair for pair in pairs if pair not in vocab][:count]


def tiktoken_file(vocab: list[bytes]) -> str:
    ranked = [(base64.b64encode(token).decode(), rank) for rank, token in enumerate(vocab)]
    return "".join(f"{token} {rank}\n" for token, rank in ranked)
