"""Progress of a training as one named bar."""

from __future__ import annotations

from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer


class NamedProgress(ProgressCallback):
    """A progress bar that says which stage runs, and leaves the numbers to the caller's table."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.what)

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass  # metrics are shown in one table at the end

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        pass  # evaluation takes a moment here


def use_quiet_progress(trainer: Trainer, what: str) -> None:
    """Replace the Trainer's printing by one named progress bar."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(NamedProgress(what))
