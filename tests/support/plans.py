"""Plans for the tests: every kind of cut by itself, and random combinations of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from hf_vitprune.families import UNITS
from hf_vitprune.plan.plan import PAD, LayerPlan, PruningPlan
from hf_vitprune.spec.architecture import Architecture

#: two draws, for tests that are slow or run over many cases
few = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def without_scales(plan: PruningPlan) -> PruningPlan:
    return plan.with_layers(replace(entry, scales={}) for entry in plan.layers)


def each_layer(plan: PruningPlan, change: Callable[[LayerPlan], LayerPlan]) -> PruningPlan:
    return plan.with_layers(change(entry) for entry in plan.layers)


def uneven(plan: PruningPlan) -> PruningPlan:
    """One neuron less in the first layer: no stock config can say that."""
    first = plan.layers[0].index
    return each_layer(plan, lambda e: replace(e, mlp=e.mlp[:-1]) if e.index == first else e)


def uneven_heads(plan: PruningPlan) -> PruningPlan:
    """Another number of heads in every layer."""
    return each_layer(plan, lambda e: e.keep_heads(e.heads[: 1 + e.index % (len(e.heads) - 1)]))


def padded_values(plan: PruningPlan) -> PruningPlan:
    """Other v channels in every head, some heads with fewer."""

    def change(entry: LayerPlan) -> LayerPlan:
        rows = [row[h % 2 :: 2] for h, row in enumerate(entry.v)]
        rows[0] = rows[0][:-1] + (PAD,)
        return replace(entry, v=tuple(rows))

    return each_layer(plan, change)


def removed_branches(plan: PruningPlan) -> PruningPlan:
    """No attention in the first layer, no MLP in the last, half an MLP elsewhere."""

    def change(entry: LayerPlan) -> LayerPlan:
        if entry.index == 0:
            return replace(entry, mixer="none", heads=(), qk=(), v=())
        if entry.index == plan.layers[-1].index:
            return replace(entry, mlp=())
        return replace(entry, mlp=entry.mlp[::2])

    return each_layer(plan, change)


def narrow_inputs(plan: PruningPlan) -> PruningPlan:
    """Attention and MLP read some residual channels only, with a factor on each."""

    def change(entry: LayerPlan) -> LayerPlan:
        width = plan.source.width(entry.index)
        read = tuple(range(entry.index % 2, width, 2))
        factors = tuple(0.5 + 0.05 * i for i in range(len(read)))
        return replace(entry, attention_in=read[:-1], mlp_in=read[::-1], scales={"mlp_in": factors})

    return each_layer(plan, change)


def scaled(plan: PruningPlan) -> PruningPlan:
    """Values and hidden neurons cut, those that stay multiplied by factors."""

    def change(entry: LayerPlan) -> LayerPlan:
        entry = replace(entry.keep_channels("v", range(3)), mlp=entry.mlp[:7])
        channels = 3 * len(entry.heads)
        return replace(entry, scales={"v": tuple(1 + i / channels for i in range(channels)), "mlp": (0.5,) * 7})

    return each_layer(plan, change)


def every_word(plan: PruningPlan) -> PruningPlan:
    """For four layers or more: a shape whose record uses every word of the format."""
    narrow, gone = narrow_inputs(plan), removed_branches(plan)
    uneven = plan.layers[1].keep_channels("qk", range(3)).keep_channels("v", range(5)).keep_heads([0, 1])
    return plan.with_layers([gone.layers[0], uneven, *narrow.layers[2:-1], gone.layers[-1]])


def random_of(*units: str) -> Callable[[PruningPlan], PruningPlan]:
    return lambda plan: PruningPlan.random(plan.source, 0.4, units, seed=1)


#: name -> dense plan to plan
PLANS: dict[str, Callable[[PruningPlan], PruningPlan]] = {
    "heads": random_of("heads"),
    "qk": random_of("qk"),
    "v": random_of("v"),
    "mlp": random_of("mlp"),
    "embedding": random_of("embedding"),
    "layers": random_of("layers"),
    "everything": lambda plan: PruningPlan.random(plan.source, 0.4, seed=2),
    "uneven heads": uneven_heads,
    "padded values": padded_values,
    "removed branches": removed_branches,
    "narrow inputs": narrow_inputs,
    "scaled": scaled,
}


#: the unit that a plan is about, where its name does not say so
NEEDS = {"uneven heads": "heads", "padded values": "v", "scaled": "v"}


def plan_named(name: str, model: PreTrainedModel | Architecture) -> PruningPlan | None:
    """None where the family has not got the unit."""
    plan = PruningPlan.dense(model)
    if NEEDS.get(name, name) in {*UNITS} - plan.source.units:
        return None
    return PLANS[name](plan)


# ---------------------------------------------------------------------- random plans
def subset(items: Sequence[int]) -> st.SearchStrategy[tuple[int, ...]]:
    """A non-empty ascending part."""
    return st.sets(st.sampled_from(list(items)), min_size=1).map(lambda chosen: tuple(sorted(chosen)))


@st.composite
def pair_rows(draw: st.DrawFn, heads: int, size: int) -> tuple[tuple[int, ...], ...]:
    """As :func:`channel_rows`, of the halves of pairs, with the other halves behind them."""
    rows = draw(channel_rows(heads, size // 2))
    return tuple(row + tuple(c if c == PAD else c + size // 2 for c in row) for row in rows)


@st.composite
def channel_rows(draw: st.DrawFn, heads: int, size: int) -> tuple[tuple[int, ...], ...]:
    """One list for all heads, or one each of one length, with PAD where a head has fewer channels."""
    if draw(st.booleans()):
        return (draw(subset(range(size))),) * heads
    rows = [draw(st.sets(st.integers(0, size - 1)).map(sorted)) for _ in range(heads)]
    length = max(1, *map(len, rows), 0)
    return tuple(tuple(row) + (PAD,) * (length - len(row)) for row in rows)


def factors(count: int) -> st.SearchStrategy[tuple[float, ...]]:
    return st.lists(st.sampled_from([-1.5, 0.0, 0.25, 1.0, 2.0]), min_size=count, max_size=count).map(tuple)


@st.composite
def layer_plans(draw: st.DrawFn, source: Architecture, index: int, narrow: bool) -> LayerPlan:
    shape, width = source.layers[index], source.width(index)
    entry = LayerPlan.dense(index, shape)
    scales: dict[str, tuple[float, ...]] = {}
    if shape.mixer != "none" and draw(st.integers(0, 5)) == 0:
        entry = entry.with_mixer(draw(st.sampled_from(["none", "identity"])))
    elif shape.mixer == "attention":
        heads = draw(subset(range(shape.heads))) if "heads" in source.units else tuple(range(shape.heads))
        rows = {name: channel_rows for name in ("qk", "v")}
        if source.family.qk_pairs:
            rows["qk"] = pair_rows
        qk, v = (
            draw(rows[name](len(heads), size)) if name in source.units else (tuple(range(size)),) * len(heads)
            for name, size in (("qk", shape.qk_dim), ("v", shape.v_dim))
        )
        entry = replace(entry, heads=heads, qk=qk, v=v)
        if draw(st.booleans()):
            scales["v"] = draw(factors(sum(map(len, v))))
        if narrow and draw(st.booleans()):
            read = draw(subset(range(shape.attention_in or width)))
            entry = replace(entry, attention_in=read)
            scales["attention_in"] = draw(factors(len(read)))
    if shape.mlp:
        entry = replace(entry, mlp=() if draw(st.integers(0, 5)) == 0 else draw(subset(range(shape.mlp))))
        if entry.mlp and draw(st.booleans()):
            scales["mlp"] = draw(factors(len(entry.mlp)))
        if entry.mlp and narrow and draw(st.booleans()):
            entry = replace(entry, mlp_in=draw(subset(range(shape.mlp_in or width))))
    return replace(entry, scales=scales)


def needed_layers(model: PreTrainedModel) -> tuple[int, ...]:
    """Layers whose outputs the model reads by their number; the last one, where it needs one more."""
    source = Architecture.of(model)
    layers, asked = len(source.layers), (model.config, source.task, len(source.layers))
    if "layers" not in source.units:
        return tuple(range(layers))
    states = source.family.read_states(*asked)
    more = {layers - 1} if states and source.family.fewest_layers(*asked) > max(states) else set()
    return tuple(sorted({state - 1 for state in states if state} | more))


def without_a_layer(model: PreTrainedModel) -> PruningPlan:
    """One layer less: the last of Swin's second stage, else the lowest but the first whose output nobody needs."""
    plan, needed = PruningPlan.dense(model), needed_layers(model)
    layers = range(len(plan.layers))
    free = [i for i in layers if i and i not in needed]
    gone = layers[-1] if plan.source.depths is not None else free[0]
    return plan.keep_layers({*layers} - {gone})


@st.composite
def pruning_plans(draw: st.DrawFn, source: Architecture, keep: tuple[int, ...] = ()) -> PruningPlan:
    """Any plan that is valid for ``source`` (it may remove nothing), with the layers ``keep`` in it."""
    stages = source.stages
    kept: list[int] = []
    for stage in range(max(stages) + 1):
        chosen = draw(subset([i for i, s in enumerate(stages) if s == stage]))
        kept += sorted({*chosen, *(i for i in keep if stages[i] == stage)})
    has_narrow = any(shape.attention_in or shape.mlp_in for shape in source.layers)
    how = draw(st.sampled_from(["all", "inputs"] + ["embedding"] * (not has_narrow)))
    embedding = None
    if how == "embedding" and "embedding" in source.units:
        embedding = draw(subset(range(source.hidden_size)))
    layers = tuple(draw(layer_plans(source, i, how == "inputs")) for i in kept)
    return PruningPlan(source, layers, embedding).validated()


# ---------------------------------------------------------------------- facts about plans
def compose(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan that does at once what ``first`` and then ``second`` (a plan for its result) do."""

    def pick(values: tuple[int, ...] | None, chosen: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if chosen is None or values is None:
            return values if chosen is None else chosen
        return tuple(PAD if c == PAD else values[c] for c in chosen)

    layers = []
    for entry in second.layers:
        old = first.layers[entry.index]
        rows = entry.heads
        layers.append(
            replace(
                entry,
                index=old.index,
                heads=pick(old.heads, entry.heads),
                qk=tuple(pick(old.qk[h], row) for h, row in zip(rows, entry.qk, strict=True)),
                v=tuple(pick(old.v[h], row) for h, row in zip(rows, entry.v, strict=True)),
                mlp=pick(old.mlp, entry.mlp),
                attention_in=pick(old.attention_in, entry.attention_in) if entry.mixer == "attention" else None,
                mlp_in=pick(old.mlp_in, entry.mlp_in),
            )
        )
    return PruningPlan(first.source, tuple(layers), pick(first.embedding, second.embedding))


def recorded_attentions(architecture: Architecture) -> list[int]:
    """Layers whose attention weights transformers gives out: all, or (Swin) the last of every stage."""
    stages = architecture.stages
    layers = range(len(stages))
    if architecture.depths is not None:
        layers = [i for i in layers if i + 1 == len(stages) or stages[i + 1] != stages[i]]
    return [i for i in layers if architecture.layers[i].mixer == "attention"]


def replaces(entry: LayerPlan, plan: PruningPlan) -> bool:
    return entry.replaces_mixer(plan.source.layers[entry.index])


def aligned(
    small: dict[str, torch.Tensor], full: dict[str, torch.Tensor], plan: PruningPlan
) -> list[tuple[str, Any, Any]]:
    """Pairs (name, small tensor, what the full-size model has for it) for every output of the small model.

    Removed layers leave no hidden state, removed heads and mixers no attention weights, removed residual channels no
    columns.
    """
    pairs = []
    columnar = plan.source.depths is None
    shapes = {e.index: e.shape(plan.source.layers[e.index]) for e in plan.layers if replaces(e, plan)}
    full_size = replace(plan.source, layers=tuple(shapes.get(i, s) for i, s in enumerate(plan.source.layers)))
    kept, dense = recorded_attentions(plan.architecture), recorded_attentions(full_size)
    for name, tensor in small.items():
        key, _, number = name.partition(".")
        if key == "hidden_states" and columnar:
            position = int(number)
            other = full[f"{key}.{position and plan.layers[position - 1].index + 1}"]
        elif key == "attentions":
            entry = plan.layers[kept[int(number)]]
            if entry.index not in dense:
                continue  # Swin gives the last layer of a stage only, and that one is gone
            other = full[f"{key}.{dense.index(entry.index)}"][:, list(entry.heads)]
        else:
            other = full[name]
        if plan.embedding is not None and tensor.shape != other.shape:
            axis = next(i for i, (a, b) in enumerate(zip(tensor.shape, other.shape, strict=True)) if a != b)
            copies = range(0, other.shape[axis], plan.source.hidden_size)  # several tokens side by side
            other = other.index_select(axis, torch.cat([torch.tensor(plan.embedding) + start for start in copies]))
        pairs.append((name, tensor, other))
    return pairs
