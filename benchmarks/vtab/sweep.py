"""Tasks x adaptations x prunings x seeds, one after the other, each run once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.markup import escape

from hf_vitprune.errors import InvalidDataError, VitPruneError

from .adapters import check_peft
from .data import load_task
from .experiment import Experiment
from .pruning import Choice, check_possible
from .settings import LAST, Machine, Run, Settings
from .store import Store
from .tasks import find_task, find_tasks


def runs_of(tasks: Iterable[str], pefts: Sequence[str], prunings: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All cells, ordered so that runs on the same adapted model follow each other."""
    labels = [Choice.parse(text).label for text in prunings]
    return [
        Run(task.name, check_peft(peft), pruning, seed)
        for task in find_tasks(tasks)
        for peft in dict.fromkeys(pefts)
        for seed in dict.fromkeys(seeds)
        for pruning in dict.fromkeys(labels)
    ]


def run_sweep(
    settings: Settings, runs: Sequence[Run], root: Path, output: Path, machine: Machine, console: Console
) -> list[tuple[Run, VitPruneError]]:
    """Do the runs that are not done yet. What can be refused is refused before the first of them.

    ``root`` has a folder a task, the console gets a line a run from the first process. Returns the runs that could not
    be done, and why; the others are done.
    """
    PartialState(cpu=machine.cpu)  # before anything else makes it
    store = Store(output)
    for pruning in dict.fromkeys(run.pruning for run in runs):
        check_possible(Choice.parse(pruning), settings)
    tasks = {
        task.name: load_task(task, root, settings.source, any_size=settings.any_size)
        for task in find_tasks(dict.fromkeys(run.task for run in runs))
    }
    store.claim(settings)
    waiting = [run for run in runs if not store.finished(run)]
    say = console.print if store.main else lambda *_: None
    if len(waiting) < len(runs):
        say(f"{len(runs) - len(waiting)} of {len(runs)} runs are done already")
    failed = []
    experiment = cache(lambda name: Experiment(settings, tasks[name], store, machine))
    for number, run in enumerate(waiting, start=1):
        try:
            record = experiment(run.task).record(run)
        except VitPruneError as error:
            failed.append((run, error))
            say(f"[red]{number}/{len(waiting)}  {run.name}: {escape(str(error))}[/]")
            continue
        store.write(run, record)
        result = record["results"]["last_epoch"]
        say(
            f"{number}/{len(waiting)}  {run.name}: {result['accuracy']:.1%}, {result['kept_layers']} of "
            f"{result['layers']} layers, {result['cost']['speedup']:.2f}x, {record['seconds']:.0f} s"
        )
    return failed


def measure_again(output: Path, root: Path, machine: Machine, console: Console) -> None:
    """Measure the speed of all finished runs again (on a quiet machine, say) and put it into their records.

    That of runs which cannot be measured again stays as it was, and the console is told why.
    """
    PartialState(cpu=machine.cpu)
    store = Store(output)
    settings, records = store.settings(), list(store.records())
    if settings is None or not records:
        raise InvalidDataError(f"there are no finished runs in {output}")

    @cache
    def experiment(name: str) -> Experiment:
        data = load_task(find_task(name), root, settings.source, any_size=settings.any_size)
        return Experiment(settings, data, store, machine)

    for record in records:
        run = Run(*(record[name] for name in ("task", "peft", "pruning", "seed")))
        try:
            measured = experiment(run.task).speed(run)
        except VitPruneError as error:
            console.print(f"[yellow]{escape(str(error))}[/]")
            continue
        for name, speed in measured.items():
            record["results"][name]["cost"] |= speed
        store.write(run, record)
        console.print(f"{run.name}: {measured[LAST]['speedup']:.2f}x")
