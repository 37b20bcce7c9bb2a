"""What half the MACs of a ViT-B/16 are worth in every runtime, float32 and int8: ``python -m benchmarks.shipped``.

Random weights: times do not depend on them. Needs a machine that does nothing else, and about 12 GB of memory.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from rich.console import Console
from transformers import ViTConfig, ViTForImageClassification

from hf_vitprune import PruningPlan, criteria, prune
from hf_vitprune.publish.bench import bench
from hf_vitprune.publish.bench.run import FORMS, bench_table, plot_bench


def main() -> None:
    """Measure, print the table, and write the samples and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("shipped.json"))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--round-to", type=int, default=32, help="sizes are multiples of it")
    parser.add_argument("--layers", type=int, default=12, help="fewer for a trial")
    given = parser.parse_args()
    torch.manual_seed(0)
    dense = ViTForImageClassification(ViTConfig(num_hidden_layers=given.layers)).eval()
    models = {"dense": dense}
    for name, units in (("half: heads, mlp", ("heads", "mlp")), ("half: qk, v, mlp", ("qk", "v", "mlp"))):
        scores = criteria.random(dense, 0)
        plan = PruningPlan.from_scores(dense, scores, target=0.5, units=units, round_to=given.round_to)
        models[name] = prune(dense, plan, stock=False)
    rows, setting = bench(
        models,
        given.forms.split(","),
        batch_sizes=given.batch_sizes,
        threads=given.threads,
        rounds=given.rounds,
    )
    Console(width=160).print(bench_table(rows, setting))
    given.out.write_text(json.dumps({"setting": setting, "rows": [row._asdict() for row in rows]}, indent=2) + "\n")
    plot_bench(rows, setting, given.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
