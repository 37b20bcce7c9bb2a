"""What can be pruned in which family, read from the registry:

python -m benchmarks.families            # prints docs/families.md
"""

from __future__ import annotations

from hf_vitprune.families import UNITS, Family, all_families
from hf_vitprune.modeling.registry import stock_classes

HEAD = """# Families

Made by `python -m benchmarks.families`. Every unit marked x passes the common tester: cut as its mask says. Plans from
random and magnitude scores work on all of them; methods and calibration that read images take families whose input is
images, which SigLIP 2 (patches) and VideoMAE (frames) are not. SPViT needs convolutions, which mix patches that lie on
a grid. A stock result loads without this library.
"""


def stock_shapes(family: Family) -> str:
    """What a stock class can hold."""
    if "embedding" not in family.units:
        return "whole layers"
    return "layers, MLP, heads, qk = v" if family.config_head_dim else "layers, MLP, qk = v with the embedding"


def table() -> str:
    """The page."""
    rows = [["`model_type`", "classes", *UNITS, "SPViT", "stock result"]]
    rows.append(["---"] * len(rows[0]))
    for family in all_families():
        classes = ", ".join(sorted(stock.__name__ for stock in stock_classes(family)))
        units = ["x" if unit in family.units else "" for unit in UNITS]
        grid = "x" if family.convolutions else ""
        rows.append([f"`{family.model_type}`", classes, *units, grid, stock_shapes(family)])
    return HEAD + "\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
