"""Random plans and damaged folders, as many as there is time for: ``python -m benchmarks.fuzz plans | folders``.

``plans``: the pruned model against the masked one, its parameters against the count, and what is saved against what
is loaded, over every family and class of the tests. ``folders``: configs, weights and adapters damaged at random; a
folder loads to the very model that was saved, or not at all and with a message.
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_vitprune
from hf_vitprune.errors import VitPruneError
from hf_vitprune.families import UNITS
from hf_vitprune.modeling import registry
from hf_vitprune.peft import save_pruned_peft
from hf_vitprune.plan.layer_plan import PAD, LayerPlan
from hf_vitprune.plan.plan import PruningPlan
from hf_vitprune.pruning import mask, prune
from hf_vitprune.spec.architecture import Architecture

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the tiny models of every family stand there
from plans import aligned, needed_layers
from tiny import CASES, images, make, relative_error, reset_weights, run
from toy_families import toy_family

#: toy families, and what is said of them
TOYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "renamed q": {},
    "k without bias": {},
    "RMSNorm": {},
    "post-norm": {"post_norm": True},
    "RoPE": {"units": frozenset(UNITS) - {"qk", "v"}, "own_attention": False},
    "extra keyword": {"units": frozenset(UNITS) - {"qk", "v"}, "own_attention": False},
}
app = typer.Typer(add_completion=False, help=__doc__)
#: what loading may say; anything else is a riddle
CLEAR = (VitPruneError, OSError, ValueError, SafetensorError, StrictDataclassError)
JUNK: tuple[Any, ...] = (None, -1, 0, 1, 3, 10**9, 2.5, "8", True, [], {}, [[1]], "pruned_vit")


# ---------------------------------------------------------------------- plans
def random_plan(source: Architecture, rng: random.Random, keep: tuple[int, ...] = ()) -> PruningPlan:
    """Any plan that is allowed: each unit is cut or left by chance, each layer in another way.

    Args:
        source: of the model.
        rng: draws.
        keep: layers that have to stay (their outputs are given by a backbone).
    """
    plan, units = PruningPlan.dense(source), source.units

    def some(size: int, least: int = 1) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(size), rng.randint(least, size))))

    def rows(heads: int, size: int, pairs: bool) -> tuple[tuple[int, ...], ...]:
        """Channels that stay, alike in all heads or in each its own, with their other halves behind them."""
        if pairs:
            halves = rows(heads, size // 2, False)
            return tuple((*row, *(c if c == PAD else c + size // 2 for c in row)) for row in halves)
        if rng.random() < 0.5:
            return (some(size),) * heads
        each = [some(size, least=0) for _ in range(heads)]
        longest = max(1, *map(len, each))
        return tuple((*row, *[PAD] * (longest - len(row))) for row in each)

    narrow = rng.random() < 0.2
    whole = rng.random() < 0.6

    def layer(entry: LayerPlan) -> LayerPlan:
        shape, width = source.layers[entry.index], source.width(entry.index)
        if shape.mixer == "attention":
            for unit, size in (("qk", shape.qk_dim), ("v", shape.v_dim)):
                if unit in units and rng.random() < 0.5:
                    pairs = unit == "qk" and source.family.qk_pairs
                    entry = replace(entry, **{unit: rows(shape.heads, size, pairs)})
            if "heads" in units and rng.random() < 0.5:
                entry = entry.keep_heads(some(shape.heads))
            if narrow and source.family.own_attention and rng.random() < 0.5:
                entry = replace(entry, attention_in=some(width))
            if rng.random() < 0.1:
                entry = entry.with_mixer(rng.choice(["none", "identity"]))
        if shape.mlp and "mlp" in units and rng.random() < 0.6:
            entry = replace(entry, mlp=some(shape.mlp, least=0))
        if entry.mlp and narrow and rng.random() < 0.5:
            entry = replace(entry, mlp_in=some(width))
        return entry

    plan = plan.with_layers(layer(entry) for entry in plan.layers)
    if "layers" in units and source.depths is None and rng.random() < 0.4:
        plan = plan.keep_layers(sorted({*some(len(source.layers)), *keep}))
    if "embedding" in units and not (narrow or whole):
        plan = replace(plan, embedding=some(source.hidden_size))
    return plan


@app.command()
def plans(
    number: Annotated[int, typer.Option(help="Plans in all.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    only: Annotated[str, typer.Option(help="Cases whose name has this in it.")] = "",
) -> None:
    """Pruned == masked, count == real, saved == loaded, in double precision."""
    _quiet()
    makers: dict[str, Callable[..., Any]] = {name: partial(make, name) for name in CASES if only in name}
    makers |= {f"toy {kind}": _toy(kind, **said) for kind, said in TOYS.items() if only in f"toy {kind}"}
    names = list(makers)
    worst: dict[str, float] = {}
    skipped = failed = 0
    start = time.time()
    for i in range(number):
        name = names[i % len(names)]
        rng = random.Random(f"{seed} {i}")
        model = makers[name](seed=i % 7).double()
        try:
            plan = random_plan(Architecture.of(model), rng, needed_layers(model)).validated()
        except VitPruneError:  # units that belong together were drawn apart
            skipped += 1
            continue
        try:
            error = _check_plan(model, plan, stock=rng.random() < 0.5, reload=i % 20 < len(names) and i % 20 == 0)
        except AssertionError as problem:
            failed += 1
            print(f"{name}, plan {i}: {problem}")
            continue
        worst[name] = max(worst.get(name, 0.0), error)
        if (i + 1) % 500 == 0:
            print(f"{i + 1} plans, worst {max(worst.values()):.1e}, {time.time() - start:.0f} s", flush=True)
    for name in sorted(worst, key=worst.__getitem__)[-5:]:
        print(f"{name}: {worst[name]:.1e}")
    top = max(worst.values(), default=math.inf)
    print(f"{number - skipped} plans over {len(names)} classes: worst difference {top:.1e}, {failed} failed")
    if failed or top > 1e-5:
        raise typer.Exit(1)


def _toy(kind: str, **said: Any) -> Callable[..., Any]:
    """Makes models of a toy family, which is registered untested."""
    family = toy_family(kind, **said)
    registry.register_family(family)
    config_class = CONFIG_MAPPING[family.model_type]

    def made(seed: int) -> Any:
        config = config_class()
        config._attn_implementation = "eager"  # with sdpa, attention that does not say otherwise is causal
        return reset_weights(registry.stock_classes(family)[0](config), seed).eval()

    return made


def _check_plan(model: Any, plan: PruningPlan, stock: bool, reload: bool) -> float:
    pixels = images().double()
    small = prune(model, plan, allow_unchanged=True, stock=stock)
    outputs = run(small, pixels)
    differences = [relative_error(a, b) for _, a, b in aligned(outputs, run(mask(model, plan), pixels), plan)]
    real = sum(p.numel() for p in small.parameters())
    if not plan.part:
        counted = hf_vitprune.count(small).params
        assert counted == real, f"count says {counted} parameters, there are {real}"
    if reload:
        with tempfile.TemporaryDirectory() as folder:
            small.save_pretrained(folder)
            loaded = type(small).from_pretrained(folder, dtype=torch.float64).eval()
        for key, tensor in small.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), f"{key} is another one after loading"
    return max(differences)


# ---------------------------------------------------------------------- damaged folders
def _saved(folder: Path) -> list[tuple[str, Path, dict[str, torch.Tensor]]]:
    """Folders of small models and of adapters, and what the models compute."""
    found = []
    for i, name in enumerate(
        ("ViTForImageClassification", "SwinForImageClassification", "Dinov2ForImageClassification")
    ):
        model = make(name, seed=i)
        small = prune(model, random_plan(Architecture.of(model), random.Random(i)), stock=False)
        small.save_pretrained(folder / name)
        found.append((name, folder / name, run(small)))
    model = make("ViTForImageClassification")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "fc1"], init_lora_weights=False))
    small = prune(adapted.eval(), PruningPlan.random(adapted, 0.4, units=["mlp", "heads"]))
    save_pruned_peft(small, folder / "adapter")
    found.append(("adapter", folder / "adapter", run(small)))
    return found


def _load(name: str, folder: Path) -> Any:
    if name == "adapter":
        base = transformers.AutoModelForImageClassification.from_pretrained(folder / "base")
        return PeftModel.from_pretrained(base, folder).eval()
    return transformers.AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False).eval()


def damage(folder: Path, rng: random.Random) -> str:
    """Change something in one file of a folder; what was done, in words."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors"))
    path = rng.choice(files)
    if path.suffix == ".json":
        return f"{path.name}: {_damage_json(path, rng)}"
    return f"{path.name}: {_damage_weights(path, rng)}"


def _damage_json(path: Path, rng: random.Random) -> str:
    if rng.random() < 0.05:
        path.write_text(path.read_text()[: rng.randrange(1, 200)])
        return "cut off"
    record = json.loads(path.read_text())
    places = [(node, key) for node in _nodes(record) for key in (node if isinstance(node, dict) else range(len(node)))]
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.3:
        del node[key]
        done = f"{key} deleted"
    else:
        node[key] = copy.deepcopy(rng.choice(JUNK))
        done = f"{key} = {node[key]!r}"
    path.write_text(json.dumps(record))
    return done


def _nodes(value: Any) -> list[Any]:
    if not isinstance(value, (dict, list)):
        return []
    children = value.values() if isinstance(value, dict) else value
    return ([value] if value else []) + [node for child in children for node in _nodes(child)]


def _damage_weights(path: Path, rng: random.Random) -> str:
    kind = rng.choice(("cut off", "one gone", "one more", "another shape", "renamed"))
    if kind == "cut off":
        data = path.read_bytes()
        path.write_bytes(data[: rng.randrange(len(data))])
        return kind
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    if kind == "one more":
        tensors |= {
            name: tensor,
            name.replace("layers.0", "layers.9").replace("layer.0", "layer.9") + "_": tensor.clone(),
        }
    elif kind == "another shape":
        tensors[name] = torch.cat([tensor, tensor]) if tensor.ndim else tensor[None]
    elif kind == "renamed":
        tensors[name[::-1]] = tensor
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{kind} ({name})"


@app.command()
def folders(
    number: Annotated[int, typer.Option(help="Damaged folders in all.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """A damaged folder loads to the very model that was saved, or is refused with a clear message.

    ``elsewhere``: transformers or PEFT stumbles before it comes to any code of this package.
    """
    _quiet()
    counts = {"same": 0, "refused": 0, "wrong": 0, "unclear": 0, "elsewhere": 0}
    with tempfile.TemporaryDirectory() as scratch:
        saved = _saved(Path(scratch) / "whole")
        broken = Path(scratch) / "broken"
        for i in range(number):
            name, whole, expected = saved[i % len(saved)]
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(whole, broken)
            done = damage(broken, random.Random(f"{seed} {i}"))
            verdict, why = _verdict(name, broken, expected)
            counts[verdict] += 1
            if verdict in ("wrong", "unclear"):
                print(f"{verdict}: {name}, folder {i}, {done}: {why}", flush=True)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    if counts["wrong"] or counts["unclear"]:
        raise typer.Exit(1)


def _verdict(name: str, folder: Path, expected: dict[str, torch.Tensor]) -> tuple[str, str]:
    try:
        model = _load(name, folder)
        outputs = run(model)
    except CLEAR as error:
        return "refused", str(error)
    except Exception as error:  # what is looked for
        if isinstance(error, RuntimeError) and "size mismatch for " in str(error):
            return "refused", str(error)  # names the tensor and both shapes
        ours = any("/hf_vitprune/" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
        return "unclear" if ours else "elsewhere", f"{type(error).__name__}: {error}"[:300]
    same = outputs.keys() == expected.keys() and all(
        a.shape == expected[k].shape and torch.allclose(a, expected[k], atol=1e-5) for k, a in outputs.items()
    )
    return ("same", "") if same else ("wrong", "it computes something else")


def _quiet() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(60)
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


if __name__ == "__main__":
    app()
