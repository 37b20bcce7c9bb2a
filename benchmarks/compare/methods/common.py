"""What methods share."""

from __future__ import annotations

#: kept residual channels, q/k and v channels and neurons are a multiple of this: 1, since four of the 64 residual
#: channels are 6 % of the MACs, and no method could be held to a budget
ROUND_TO = 1
GROUP_SIZES = {"embedding": ROUND_TO, "heads": 1, "qk": ROUND_TO, "v": ROUND_TO, "mlp": ROUND_TO}
