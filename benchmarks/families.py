"""What can be pruned in which family, read from the registry:

python -m benchmarks.families            # prints docs/families.md
"""

from __future__ import annotations

from hf_vitprune.families import UNITS, Family, all_families
from hf_vitprune.family_check import tiny_model
from hf_vitprune.modeling.registry import stock_classes
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import prune

HEAD = """# Families

Made by `python -m benchmarks.families`. Every unit marked x passes the common tester: cut as its mask says. Plans from
random and magnitude scores work on all of them; methods and calibration that read images take families whose input is
images, which SigLIP 2 (patches) and VideoMAE (frames) are not. SPViT needs convolutions, which mix patches that lie on
a grid. A stock result loads without this library: the last column has what gave one on a tiny model, when the last
layer was removed, or half of the units, alike in all layers. DINOv2's MLPs need a whole ratio; Swin's layers go where
plain and shifted windows still take turns.
"""


#: what half of is removed, the same in all layers -> its units
CUTS = {
    "MLP": ("mlp",),
    "heads": ("heads",),
    "q/k as v": ("qk", "v"),
    "embedding": ("embedding",),
    "q/k as v with the embedding": ("qk", "v", "embedding"),
}


def stock_shapes(family: Family) -> str:
    """What a stock class was found to hold: each cut is made, and the class of the result looked at."""
    model = tiny_model(family)
    dense = PruningPlan.dense(model)
    plans = {"layers": dense.keep_layers(range(len(dense.layers) - 1))}
    for name, units in CUTS.items():
        if set(units) <= dense.source.units:
            plans[name] = PruningPlan.random(model, 0.5, units, round_to=1)
    return ", ".join(name for name, plan in plans.items() if type(prune(model, plan)) is type(model))


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
