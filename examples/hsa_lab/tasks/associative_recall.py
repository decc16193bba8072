"""
Multi-query associative recall as token ids: a memory of key-value pairs scattered over filler tokens, a gap, and
questions: a key, to be answered with its value.
"""

import torch


NUM_KEYS, NUM_VALUES, NUM_FILLERS = 64, 64, 32
VOCAB_SIZE = NUM_KEYS + NUM_VALUES + NUM_FILLERS
CHUNK_SIZE = 16


def make_batch(batch: int, memory_chunks: int, questions: int, gap: int, device: torch.device, generator=None):
    """
    As many pairs as chunks (at most as many as there are keys) at random even places of the memory, the rest fillers;
    then `gap` fillers; then the questions.

    Returns:
        input_ids, labels (-100 except for the answers), both int64 [batch, memory_chunks * 16 + gap + 2 * questions],
        and the chunk that holds each answer, [batch, questions].
    """

    def integers(high, *shape):
        return torch.randint(high, shape, device=device, generator=generator)

    def distinct(high, count):
        return torch.rand(batch, high, device=device, generator=generator).argsort(1)[:, :count]

    pairs = min(memory_chunks, NUM_KEYS)
    fillers = NUM_KEYS + NUM_VALUES + integers(NUM_FILLERS, batch, memory_chunks * CHUNK_SIZE + gap)
    keys, values = distinct(NUM_KEYS, pairs), NUM_KEYS + integers(NUM_VALUES, batch, pairs)
    place = 2 * distinct(memory_chunks * CHUNK_SIZE // 2, pairs)
    memory = fillers.scatter(1, place, keys).scatter(1, place + 1, values)

    pair = distinct(pairs, min(questions, pairs))
    asked = torch.stack([keys.gather(1, pair), values.gather(1, pair)], dim=-1).flatten(1)
    input_ids = torch.cat([memory, asked], dim=1)
    labels = torch.full_like(input_ids, -100)
    labels[:, memory.shape[1] + 1 :: 2] = asked[:, 1::2]
    return input_ids, labels, place.gather(1, pair) // CHUNK_SIZE


def make_local_batch(batch: int, groups: int, device: torch.device):
    """
    The same task inside the window: groups of eight tokens, two pairs and then both keys asked in random order. It
    teaches the window layers to mark a value with the key before it, which is what the memory is later searched by.
    """
    keys = torch.rand(batch, groups, NUM_KEYS, device=device).argsort(-1)[..., :2]
    values = NUM_KEYS + torch.randint(NUM_VALUES, (batch, groups, 2), device=device)
    pairs = torch.stack([keys, values], dim=-1)
    asked = torch.where(torch.rand(batch, groups, 1, 1, device=device) < 0.5, pairs, pairs.flip(2))
    input_ids = torch.cat([pairs, asked], dim=2).flatten(1)
    labels = torch.full_like(input_ids, -100).view(batch, groups, 8)
    labels[..., 5::2] = asked[..., 1]
    return input_ids, labels.flatten(1)
