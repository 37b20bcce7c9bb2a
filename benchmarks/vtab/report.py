"""The results of a sweep as tables: one as papers have it, and one with every step of every run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from hf_vitprune.errors import InvalidDataError
from hf_vitprune.publish.report import human, markdown_table

from .settings import BEST, LAST, MODEL, RESULTS
from .tasks import GROUPS, TASKS, VTAB

RESULT_TITLES = {
    LAST: "Last epoch, trained on train800val200",
    BEST: "Best epoch on val200, trained on train800",
}
NOTHING = "–"
#: group mean and mean of nineteen that papers report for google/vit-base-patch16-224-in21k, in percent; they took the
#: best epoch on the test images, which is not done here
PUBLISHED = {
    "LoRA, r = 8": (74.60, 72.25),
    "Convpass": (76.56, 74.44),
    "RepAdapter": (76.09, 73.84),
    "linear": (57.64, 52.94),
    "full": (68.97, 65.57),
}


@dataclass(frozen=True)
class Row:
    """All runs of one adaptation and one pruning; ``records``: task -> its runs, one a seed."""

    peft: str
    pruning: str
    records: Mapping[str, Sequence[Mapping[str, Any]]]

    def values(self, task: str, read: Callable[[Mapping[str, Any]], Any]) -> list[float]:
        """What ``read`` finds in the runs on a task that have it."""
        found = [read(record) for record in self.records.get(task, ())]
        return [value for value in found if value is not None]

    def mean(self, task: str, read: Callable[[Mapping[str, Any]], Any]) -> float | None:
        """Mean over the seeds."""
        values = self.values(task, read)
        return fmean(values) if values else None

    def mean_of_tasks(self, read: Callable[[Mapping[str, Any]], Any]) -> float | None:
        """Mean over the tasks of the means over the seeds."""
        means = [mean for task in self.records if (mean := self.mean(task, read)) is not None]
        return fmean(means) if means else None


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row an adaptation and pruning, in the order of their names, unpruned first."""
    table: dict[tuple[str, str], dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        key = record["peft"], record["pruning"]
        table.setdefault(key, {}).setdefault(record["task"], []).append(record)
    if not table:
        raise InvalidDataError("there are no finished runs to report on")
    order = sorted(table, key=lambda key: (key[0], key[1] != "none", key[1] != "sls", key[1]))
    return [Row(*key, table[key]) for key in order]


def at(*path: str) -> Callable[[Mapping[str, Any]], Any]:
    """Reads a value of a record; None where it is not there."""

    def read(record: Mapping[str, Any]) -> Any:
        value: Any = record
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    return read


def means_of(accuracies: Mapping[str, float | None]) -> dict[str, float | None]:
    """Mean of each group, of the three groups, and of the nineteen tasks; None for what lacks a task.

    Args:
        accuracies: task -> accuracy; tasks outside VTAB-1k count nowhere.
    """

    def mean(values: list[float | None]) -> float | None:
        return None if None in values else fmean(v for v in values if v is not None)

    found = {group: mean([accuracies.get(t.name) for t in VTAB if t.group == group]) for group in GROUPS}
    found["group mean"] = mean(list(found.values()))
    return found | {"mean of 19": mean([accuracies.get(task.name) for task in VTAB])}


# ---------------------------------------------------------------------- text
def report_markdown(records: Sequence[Mapping[str, Any]], notes: Sequence[str] = ()) -> str:
    """The whole report; ``notes`` are further lines for its head."""
    rows = rows_of(records)
    parts = ["# VTAB-1k report", "", *_remarks(records), *notes, ""]
    for result in RESULTS:
        if any(at("results", result)(record) for record in records):
            parts += [f"## {RESULT_TITLES[result]}", "", paper_table(rows, result), ""]
    parts += ["## Step by step", "", step_table(rows), ""]
    if {record["settings"]["model"] for record in records} == {MODEL}:
        parts += ["## Published", "", _published(), ""]
    return "\n".join(parts)


def paper_table(rows: Sequence[Row], result: str) -> str:
    """A line an adaptation and pruning: accuracies in percent, what is stored, throughput, kept layers."""
    tasks = _tasks(rows)
    titles = [_title(rows, task) for task in tasks]
    means = list(means_of({}))
    cells = [["", *titles, *means, "stored a task", "stored in all", "throughput", "layers kept"]]
    for row in rows:
        accuracy = at("results", result, "accuracy")
        accuracies = {task: row.mean(task, accuracy) for task in tasks}
        if all(value is None for value in accuracies.values()):
            continue
        overall = [_percent([value] if value is not None else []) for value in means_of(accuracies).values()]
        kept, layers, stored, speedup = (
            row.mean_of_tasks(at("results", result, *path))
            for path in (("kept_layers",), ("layers",), ("cost", "stored", "params"), ("cost", "speedup"))
        )
        depth = NOTHING if kept is None or layers is None else f"{kept:.3g} of {layers:.3g}"
        sizes = [human(stored or 0), human(stored_in_all(row, result)), _ratio(speedup), depth]
        spread = [_percent(row.values(task, accuracy)) for task in tasks]
        cells.append([f"{row.peft}, {row.pruning}", *spread, *overall, *sizes])
    return markdown_table(cells)


def stored_in_all(row: Row, result: str) -> float:
    """Parameters on disk for all of a row's tasks: a backbone that they share counts once."""
    own, backbone = 0.0, 0.0
    for runs in row.records.values():
        costs = [run["results"][result]["cost"] for run in runs if result in run["results"]]
        if not costs:
            continue
        own += fmean(cost["stored"]["params"] for cost in costs)
        if any(cost["stored"]["shared_backbone"] for cost in costs):
            backbone = max(backbone, *(cost["backbone_params"] for cost in costs))
    return own + backbone


def step_table(rows: Sequence[Row]) -> str:
    """A line a task, adaptation and pruning: accuracy before, truncated and retrained (last epoch), and the cost."""
    heading = ["", "pruning", "before", "just pruned", "final", "layers", "MACs", "stored", "bytes", "throughput"]
    cells = [heading]
    for task in _tasks(rows):
        for row in rows:
            if task not in row.records:
                continue
            steps = [at("results", LAST, name) for name in ("accuracy_before", "accuracy_truncated", "accuracy")]
            kept = sorted({int(value) for value in row.values(task, at("results", LAST, "kept_layers"))})
            macs, dense, params, size, speedup = (
                row.mean(task, at("results", LAST, "cost", *path))
                for path in (("macs",), ("dense_macs",), ("stored", "params"), ("stored", "bytes"), ("speedup",))
            )
            accuracies = [_percent(row.values(task, read)) for read in steps]
            share = NOTHING if not macs or not dense else f"{macs / dense:.2f}"
            sizes = [", ".join(map(str, kept)), share, human(params or 0), f"{human(size or 0)}B", _ratio(speedup)]
            cells.append([f"{_title(rows, task)}, {row.peft}", row.pruning, *accuracies, *sizes])
    return markdown_table(cells)


def _remarks(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader has to know to compare the numbers."""
    settings = records[0]["settings"]
    recipe = settings["recipe"]
    seeds = sorted({record["seed"] for record in records})
    lines = [
        f"- Model {settings['model']}; {settings['preprocessing']} preprocessing; {recipe['epochs']} epochs "
        f"({recipe['warmup_epochs']} of warm-up), AdamW, learning rate {recipe['learning_rate']:g}, weight decay "
        f"{recipe['weight_decay']:g}, batch {recipe['batch_size']}; seeds {', '.join(map(str, seeds))}.",
        "- Accuracies in percent on test images, of the last epoch or of the epoch that is best on val200; never of "
        "the epoch that is best on test.",
        "- Stored: what a task keeps on disk beside a backbone that it shares with others (adapters, head and the "
        "number of layers), or its whole model where it shares none.",
        "- Throughput: images a second as a multiple of the unpruned adapted model's; both take turns, medians; on "
        f"{', '.join(sorted({record['environment']['device'] for record in records}))}, batch "
        f"{settings['speed_batch']}.",
    ]
    for task in sorted({record["task"] for record in records}, key=list(TASKS).index):
        data = next(record["data"] for record in records if record["task"] == task)
        title = next(record["reported_as"] for record in records if record["task"] == task)
        if data["test_images"] != data["of_test_images"]:
            lines.append(
                f"- {title}: tested on {data['test_images']} of {data['of_test_images']} test images, drawn once."
            )
        if data["deviations"]:
            lines.append(f"- {title} is **not VTAB-1k's split**: {'; '.join(data['deviations'])}.")
    return lines


def _published() -> str:
    rows = [[name, *(f"{value:.2f}" for value in row)] for name, row in PUBLISHED.items()]
    cells = [["", "group mean", "mean of 19"], *rows]
    return markdown_table(cells) + "\n\nPapers took the best epoch on the test images."


# ---------------------------------------------------------------------- cells
def _tasks(rows: Sequence[Row]) -> list[str]:
    present = {task for row in rows for task in row.records}
    return [name for name in TASKS if name in present]


def _title(rows: Sequence[Row], task: str) -> str:
    return next(row.records[task][0]["reported_as"] for row in rows if task in row.records)


def _percent(values: Sequence[float]) -> str:
    if not values:
        return NOTHING
    mean = f"{100 * fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * stdev(values):.2f}"


def _ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}x"
