"""One order over the units of all sets, and what stays when the first so many are gone: shared by all methods."""

from __future__ import annotations

from collections.abc import Mapping

import torch

#: set -> (units,) booleans
_Kept = dict[str, torch.Tensor]


class Ranking:
    """Units of several sets in one order: those with the lowest keys go first.

    Args:
        keys: set -> (units,); scores, or anything that can be compared over all sets.
    """

    def __init__(self, keys: Mapping[str, torch.Tensor]) -> None:
        self.keys = dict(keys)
        self._ranked = torch.cat(list(self.keys.values())).sort().values

    def __len__(self) -> int:
        """Number of units."""
        return len(self._ranked)

    def kept(self, dropped: int) -> _Kept:
        """Set -> (units,) booleans: what stays when this many units go, over all sets."""
        if dropped >= len(self):
            return {name: torch.zeros_like(keys, dtype=torch.bool) for name, keys in self.keys.items()}
        threshold = self._ranked[dropped]
        above = {name: keys >= threshold for name, keys in self.keys.items()}
        return self._without_ties(above, threshold, dropped)

    def _without_ties(self, above: _Kept, threshold: torch.Tensor, dropped: int) -> _Kept:
        """Drop just enough of the units that sit exactly on the threshold, spread evenly over the sets and in them.

        Without it, equal keys (all of them, before a training) would stay or go together.
        """
        excess = sum(int(kept.sum()) for kept in above.values()) - (len(self) - dropped)
        tied = {name: (self.keys[name] == threshold).nonzero().squeeze(1) for name in above}
        total = sum(map(len, tied.values()))
        out, seen, gone = {}, 0, 0
        for name, kept in above.items():
            seen += len(tied[name])
            quota = round(excess * seen / total)
            out[name] = kept.clone()
            count = quota - gone
            out[name][tied[name][torch.arange(count) * len(tied[name]) // max(count, 1)]] = False
            gone = quota
        return out
