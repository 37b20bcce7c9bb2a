"""NViT's ranking: groups of all sets in one list, the cost they save, floors, and when they go."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DeiTConfig, SwinConfig, ViTConfig

from hf_vitprune import Architecture, NViTConfig
from hf_vitprune.cost.meter import ClosedFormMeter
from hf_vitprune.errors import InvalidConfigError, UnreachableTargetError, UnsupportedUnitError
from hf_vitprune.methods.nvit.config import Schedule
from hf_vitprune.methods.nvit.groups import (
    GroupedSet,
    Sizes,
    fewest_groups,
    grouped_sets,
    plan_of,
    removals,
    resized,
    smallest_ratio,
)
from pruning_runs import SMALL_GROUPS, VIT, nvit, scatter_scores
from tiny import CASES, make

#: 18 prunable sets; heads of 16, MLPs of 64
VIT_CONFIG = ViTConfig(
    hidden_size=32, num_attention_heads=2, num_hidden_layers=4, intermediate_size=64, image_size=32, patch_size=8
)
GROUPS = {"embedding": 8, "heads": 1, "qk": 4, "v": 4, "mlp": 8}


def make_sets(config: Any = VIT_CONFIG, **options: Any) -> tuple[Architecture, tuple[GroupedSet, ...]]:
    architecture = Architecture.dense(config)
    return architecture, grouped_sets(architecture, NViTConfig(**{"target": 0.5, "group_sizes": GROUPS, **options}))


# ---------------------------------------------------------------------- sets and groups
def test_deit_base_has_the_published_units_and_groups() -> None:
    architecture = Architecture.dense(DeiTConfig(), "ForImageClassificationWithTeacher")
    sets = grouped_sets(architecture, NViTConfig(target=0.5))
    assert (len(sets), sets[-1].places.stop, sum(one.groups for one in sets)) == (49, 39_312, 2_616)
    assert [one.size for one in sets[:5]] == [768, 12, 64, 64, 3072]
    assert [one.group for one in sets[:5]] == [16, 2, 8, 8, 16]
    places = [i for one in sets for i in range(one.places.start, one.places.stop)]
    assert places == list(range(39_312))


@pytest.mark.parametrize("case", CASES)
def test_every_family_has_sets(case: str) -> None:
    architecture = Architecture.of(make(case))
    kinds = {one.unit for one in grouped_sets(architecture, NViTConfig(target=0.5, group_sizes=SMALL_GROUPS))}
    assert kinds == architecture.units - {"layers"}


def test_group_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="groups of 12 do not divide the 32 embedding units of vit.*16, 32"):
        make_sets(group_sizes={**GROUPS, "embedding": 12})
    with pytest.raises(InvalidConfigError, match="groups of 2 do not divide the 3 heads units of layer 0 of the deit"):
        make_sets(DeiTConfig(hidden_size=192, num_attention_heads=3, intermediate_size=768), group_sizes={})
    with pytest.raises(InvalidConfigError, match=r"layer 0 of the swin: set group_sizes=\{'mlp'"):
        make_sets(SwinConfig(), group_sizes={"heads": 1, "mlp": 5})
    with pytest.raises(UnsupportedUnitError, match="swin models have no prunable unit 'embedding'"):
        make_sets(SwinConfig(), group_sizes={"heads": 1}, units=["embedding", "mlp"])


def test_a_model_pruned_at_its_inputs_has_no_embedding_set() -> None:
    layers = [{"attention_in": 16}, {}, {}, {}]
    architecture = Architecture.from_layers(VIT_CONFIG, layers)
    assert grouped_sets(architecture, NViTConfig(target=0.5, group_sizes=GROUPS))[0].unit == "heads"


# ---------------------------------------------------------------------- cost, kept up to date
@settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 16), max_size=30), st.sampled_from(["macs", "params"]), st.booleans())
def test_costs_are_those_of_the_architecture(picks: list[int], metric: str, swin: bool) -> None:
    """After any removals: the ratio, and what a group of each set would save, found from scratch."""
    swin_config = SwinConfig(
        embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2, image_size=16, patch_size=2, mlp_ratio=2.0
    )
    source, sets = make_sets(swin_config if swin else VIT_CONFIG)
    meter = ClosedFormMeter(metric, source)
    sizes = Sizes(source, sets, [one.size for one in sets], meter)
    for pick in picks:
        if sizes.removable(pick % len(sets)):
            sizes.remove(pick % len(sets))
    now = meter.ratio(resized(source, sets, sizes.counts))
    assert sizes.ratio == pytest.approx(now, rel=1e-12)
    for position, one in enumerate(sets):
        fewer = [count - one.group * (i == position) for i, count in enumerate(sizes.counts)]
        expected = now - meter.ratio(resized(source, sets, fewer)) if sizes.removable(position) else 0.0
        assert sizes.savings[position] == pytest.approx(expected, rel=1e-9, abs=1e-15)
    # and a table of numbers made anew agrees
    again = Sizes(source, sets, sizes.counts, meter)
    assert again.savings == pytest.approx(sizes.savings)


@settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 20))
def test_the_lowest_group_goes_first(seed: int, eta: float, removed: int) -> None:
    """One by one: the group with the least of (share of importance) - eta * (share of cost), with current sizes."""
    source, sets = make_sets()
    meter = ClosedFormMeter("macs", source)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(sets[-1].places.stop, generator=generator) ** 4
    alive = torch.ones_like(scores, dtype=torch.bool)
    for removal in islice(removals(Sizes(source, sets, [o.size for o in sets], meter), alive, scores, 0.0), removed):
        alive[removal.units] = False
    counts = [int(alive[one.places].sum()) for one in sets]
    groups = []  # all there are now: members, and importance
    for position, one in enumerate(sets):
        members = sorted((i for i in range(one.places.start, one.places.stop) if alive[i]), key=lambda i: scores[i])
        chunks = [members[i : i + one.group] for i in range(0, len(members), one.group)]
        groups += [(position, chunk, scores[chunk].double().sum().item()) for chunk in chunks]
    total = sum(score for _, _, score in groups)
    order = removals(Sizes(source, sets, counts, meter), alive, scores, eta)
    for removal in islice(order, 6):
        now = meter.ratio(resized(source, sets, counts))
        best = None
        for position, chunk, score in groups:
            one = sets[position]
            if counts[position] > one.group:
                fewer = [count - one.group * (i == position) for i, count in enumerate(counts)]
                value = score / total - eta * (now - meter.ratio(resized(source, sets, fewer)))
                best = min(best or (value, position, chunk), (value, position, chunk))
        assert best is not None
        assert (removal.set, sorted(removal.units.tolist())) == (best[1], sorted(best[2]))
        counts[removal.set] -= sets[removal.set].group
        assert removal.ratio == pytest.approx(meter.ratio(resized(source, sets, counts)))
        groups.remove(next(g for g in groups if g[0] == best[1] and g[1] == best[2]))


def test_floors() -> None:
    """Everything goes but one group of each set, whatever the scores; equal ones go evenly."""
    source, sets = make_sets()
    meter = ClosedFormMeter("macs", source)
    units = sets[-1].places.stop
    for scores in (torch.zeros(units), torch.rand(units), torch.full((units,), -1.0)):
        alive = torch.ones(units, dtype=torch.bool)
        sizes = Sizes(source, sets, [one.size for one in sets], meter)
        order = list(removals(sizes, alive, scores, 0.0))
        for removal in order:
            assert alive[removal.units].all()
            alive[removal.units] = False
        assert len(order) == sum(one.groups - 1 for one in sets)
        assert [int(alive[one.places].sum()) for one in sets] == [one.group for one in sets]
        assert order[-1].ratio == pytest.approx(smallest_ratio(source, sets, meter))
        assert plan_of(source, sets, alive).architecture == resized(source, sets, sizes.counts)
    sizes = Sizes(source, sets, [one.size for one in sets], meter)
    everything = torch.ones(units, dtype=torch.bool)
    first = list(islice(removals(sizes, everything, torch.zeros(units), 0.0), len(sets)))
    assert {removal.set for removal in first} == set(range(len(sets)))  # every set gives one before any gives two


@pytest.mark.parametrize("target", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("metric", ["macs", "params"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_target_is_reached_from_above_by_at_most_one_group(target: float, metric: str, eta: float) -> None:
    model = scatter_scores(nvit(target=target, target_metric=metric, eta=eta))
    method = model.method
    model.decide()
    moments = method.moments()
    assert moments[-1].ratio <= target < moments[-2].ratio
    assert method.ratio == pytest.approx(ClosedFormMeter(metric, method.architecture).ratio(model.plan().architecture))
    assert method.plan_at(target) == model.plan()
    earlier = method.plan_at(moments[len(moments) // 2].ratio)
    assert len(moments) < 3 or earlier.info["groups_removed"] == len(moments) // 2 < method.groups
    with pytest.raises(UnreachableTargetError, match="the run is at"):
        method.plan_at(target / 2)


def test_a_target_under_the_floors_is_refused_before_training() -> None:
    method = nvit(target=0.9).method
    lowest = smallest_ratio(method.architecture, method.sets, method._meter)
    assert 0.01 < lowest < 0.1
    with pytest.raises(UnreachableTargetError, match=f"of 0.010 of the macs cannot be reached.*{lowest:.3f} remains"):
        nvit(target=0.01)
    assert scatter_scores(nvit(target=lowest * 1.0001)).method.target > lowest
    with pytest.raises(UnreachableTargetError, match="cannot be reached"):
        nvit(target=0.9, units=["qk"], group_sizes={**SMALL_GROUPS, "qk": 8})


# ---------------------------------------------------------------------- the schedule
def test_published_schedule() -> None:
    schedule = Schedule.of(NViTConfig(target=0.5, groups_per_step=2), 100_000)
    assert (schedule.interval, schedule.count) == (100, 1000)
    assert [schedule.cumulative(k) for k in range(1, 6)] == [1, 2, 4, 6, 8]
    assert [schedule.prune_step(step) for step in (1, 99, 100, 101, 200, 100_000)] == [0, 0, 1, 0, 2, 1000]
    assert [schedule.due(k, removed, 500) for k, removed in ((1, 0), (2, 1), (3, 2), (4, 4))] == [1, 1, 2, 2]
    for groups, expected in ((1, [1, 2, 3, 4]), (5, [1, 5, 10, 15])):
        given_ = Schedule.of(NViTConfig(target=0.5, groups_per_step=groups), 1000)
        assert [given_.cumulative(k) for k in range(1, 5)] == expected


@settings(max_examples=50, deadline=None, database=None)
@given(st.integers(1, 5000), st.integers(1, 3000), st.sampled_from([None, 0.2, 1.0]))
def test_derived_schedules_always_get_there(max_steps: int, missing: int, share: float | None) -> None:
    """The last prune step comes in time and removes all that is missing by then, even if that is a surprise."""
    schedule = Schedule.of(NViTConfig(target=0.5, pruning_share=share), max_steps)
    steps = [step for step in range(1, max_steps + 1) if schedule.prune_step(step)]
    assert len(steps) == schedule.count >= 1 and steps[-1] <= max(1, max_steps * (share or 0.5))
    assert schedule.interval <= 100 and (schedule.count >= 20 or schedule.interval == 1)
    removed = 0
    for step in steps:
        due = schedule.due(schedule.prune_step(step), removed, missing)
        assert due <= missing
        removed, missing = removed + due, missing - due
        if step == steps[len(steps) // 2] and step != steps[-1]:
            missing += 7
    assert missing == 0


def test_schedules_that_cannot_work_are_refused() -> None:
    with pytest.raises(InvalidConfigError, match="interval=300 leaves no prune step.*first 250 of 500 steps"):
        Schedule.of(NViTConfig(target=0.5, interval=300), 500)
    method = nvit(target=0.3, groups_per_step=1, interval=1, eta=0).method
    fewest = fewest_groups(method.architecture, method.sets, method._meter, 0.3)
    with pytest.raises(InvalidConfigError, match=f"removes {fewest - 1} groups.*takes {fewest} at the least"):
        method.check_training(None, fewest - 1)  # type: ignore[arg-type]
    method.check_training(None, fewest)  # type: ignore[arg-type]
    whole = scatter_scores(nvit(target=0.3, eta=0))
    whole.decide()
    assert 1 < fewest <= whole.method.groups


# ---------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": None}, "NViT prunes to a target"),
        ({"gate_learning_rate": 0.01}, "NViT has no gates"),
        *[({"target": t}, "target must lie strictly") for t in (0, 1, 54, "half")],
        ({"target_metric": "flops"}, "target_metric is one of"),
        ({"target_metric": "latency"}, "latency_table go together"),
        *[({"criterion": c}, "criterion is one of squared_taylor, taylor") for c in ("hessian", None)],
        *[({"reference": r}, "reference is True or False") for r in (1, "yes")],
        *[({"eta": e}, "eta is a number, not negative") for e in (-1, "1", float("nan"))],
        *[({"momentum": m}, "momentum") for m in (1, 1.5, -0.1)],
        *[({"group_sizes": g}, "group_sizes") for g in (16, {"layers": 1}, {"mlp": 0}, {"mlp": 1.5}, None)],
        *[({"units": u}, "units is a non-empty choice of") for u in ([], ["layers"], "mlp", ["v", "v"])],
        *[({"interval": i}, "interval is a whole number of at least 1") for i in (0, 1.5, True)],
        *[({"groups_per_step": g}, "groups_per_step is a whole number") for g in (0, -2, "2")],
        *[({"pruning_share": s}, "pruning_share") for s in (0, 1.5, -1, "all")],
        *[({"seed": s}, "seed is a whole number of at least 0") for s in (-1, 0.5)],
        ({"snapshots": [0.8]}, "snapshots and snapshot_folder go together"),
        ({"snapshot_folder": "out"}, "snapshots and snapshot_folder go together"),
        *[({"snapshots": s, "snapshot_folder": "out"}, m) for s, m in (([0.4], "on the way"), ([0.8, 0.8], "twice"))],
        *[({"snapshots": s, "snapshot_folder": "out"}, "snapshot") for s in (0.8, [1.5], ["half"])],
    ],
)
def test_impossible_settings_are_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfigError, match=message):
        NViTConfig(**{"target": 0.5, **options})


def test_group_sizes_are_given_in_part() -> None:
    config = NViTConfig(target=0.5, group_sizes={"heads": 1})
    assert config.group_sizes == {"embedding": 16, "heads": 1, "qk": 8, "v": 8, "mlp": 16}
    assert nvit().method.sets[0].group == 4 and VIT in CASES
