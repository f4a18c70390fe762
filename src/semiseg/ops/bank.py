"""A queue of features for each class, on the device (Wang et al., U2PL, CVPR 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Bank(nn.Module):
    """The newest keys of every class, first in, first out.

    Buffers, and so in every checkpoint: keys (sum of the capacities, D) float16, class after class; fill and next (C,)
    int64. Keys are directions, of length 1: half precision is exact to about 0.0005 there, at half the memory.
    """

    keys: Tensor
    fill: Tensor
    next: Tensor
    capacity: Tensor
    first: Tensor

    def __init__(self, capacities: Sequence[int], width: int) -> None:
        """`capacities` in keys, one a class; `width` D of a key."""
        super().__init__()
        assert min(capacities) > 0, capacities
        self.least = min(capacities)
        capacity = torch.tensor(capacities)
        self.register_buffer("keys", torch.zeros(sum(capacities), width, dtype=torch.float16))
        self.register_buffer("fill", torch.zeros_like(capacity))
        self.register_buffer("next", torch.zeros_like(capacity))
        self.register_buffer("capacity", capacity, persistent=False)
        self.register_buffer("first", capacity.cumsum(0) - capacity, persistent=False)

    @torch.no_grad()
    def push(self, keys: Tensor, good: Tensor) -> None:
        """Appends the good keys, in their order. keys (C, K, D) of length 1; good (C, K) bool."""
        # In parts that fit into every queue: two keys in one place would leave it to chance which of them stays.
        for some, kept in zip(keys.split(self.least, 1), good.split(self.least, 1), strict=True):
            self._push(some, kept)

    def _push(self, keys: Tensor, good: Tensor) -> None:
        # Good ones take the places from `next` on; the others those behind them, where they leave what is there.
        count = good.sum(1)
        order = torch.where(good, good.cumsum(1) - 1, count.unsqueeze(1) + (~good).cumsum(1) - 1)
        place = self.first.unsqueeze(1) + (self.next.unsqueeze(1) + order) % self.capacity.unsqueeze(1)
        self.keys[place] = torch.where(good.unsqueeze(2), keys.to(self.keys.dtype), self.keys[place])
        self.next.copy_((self.next + count) % self.capacity)
        self.fill.copy_((self.fill + count).minimum(self.capacity))

    @torch.no_grad()
    def draw(self, u: Tensor) -> Tensor:
        """Keys of every class with replacement, by uniform numbers u (C, R) in [0, 1) -> (C, R, D) in u's precision.

        A class without a key gives what lies there: see `fill`.
        """
        inside = (u * self.fill.unsqueeze(1)).long()
        # u is less than 1, but its product with a large number may be rounded up to that number.
        inside = inside.minimum((self.fill.unsqueeze(1) - 1).clamp(min=0))
        return self.keys[self.first.unsqueeze(1) + inside].to(u.dtype)
