"""Keys and values of sequences in scattered blocks of a pool, and back."""

from __future__ import annotations

import numpy as np


def to_pool(keys, values, per_block, seed=0):
    """Sequences' keys and values [L, G, capacity, head_dim] -> pool [blocks, L, 2, G, per_block, head_dim] and tables.

    Blocks are in random order, with unused ones between; what is no position of a sequence is NaN.
    """
    counts = [-(-sequence.shape[2] // per_block) for sequence in keys]
    numbers = np.random.default_rng(seed).permutation(sum(counts) + 3)[: sum(counts)].astype(np.int64)
    layers, groups, _, head_dim = keys[0].shape
    pool = np.full((sum(counts) + 3, layers, 2, groups, per_block, head_dim), 0xFF, keys[0].dtype)
    if pool.dtype == np.uint16:
        pool[:] = 0x7FC0
    if pool.dtype == np.float32:
        pool[:] = np.nan
    tables = np.split(numbers, np.cumsum(counts)[:-1])
    for table, *memories in zip(tables, keys, values, strict=True):
        for index, number in enumerate(table):
            for memory, stored in enumerate(memories):
                block = stored[:, :, index * per_block : (index + 1) * per_block]
                pool[number, :, memory, :, : block.shape[2]] = block
    return pool, [table.copy() for table in tables]


def from_pool(pool, table, capacity):
    """A sequence's keys and values [L, G, capacity, head_dim] in the blocks of its table."""
    blocks = np.moveaxis(pool[table], 0, 3)  # [L, 2, G, blocks, per_block, head_dim]
    layers, memories, groups, _, _, head_dim = blocks.shape
    whole = blocks.reshape(layers, memories, groups, -1, head_dim)[:, :, :, :capacity]
    return whole[:, 0].copy(), whole[:, 1].copy()
