"""OneShotScores: what every size of every layer costs in accuracy; kept in a file, cut to any budget."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ...criteria.scores import read_scores, write_scores
from ...errors import InvalidDataError, UnsupportedModelError
from ...modeling.peft_twin import is_peft, plain_part
from ...plan.plan import PruningPlan
from ...spec.architecture import Architecture
from ...utils.batches import ImageBatches
from ...utils.examples import processed
from ...utils.offload import StateDict, check_weights, device_of
from ...utils.processes import shard
from ...utils.sharding import check_whole
from .choose import best_plan
from .folds import rebuilt
from .measure import Measurement
from .settings import OneShotSettings

FORMAT_VERSION = 1
#: key of the record in the metadata of a file
_RECORD = "hf_vitprune_scores"


@dataclass(frozen=True)
class OneShotScores:
    """What every size of every layer of a model costs in accuracy.

    Attributes:
        fingerprint: digest of the model's weights.
        settings, images: what they were measured with, and how many were seen.
        tensors: ``<layer>.<name>``. ``heads`` and ``neurons``: order of removal. ``values`` (heads kept - 1, sizes),
            ``queries`` (sizes, head), ``neuron_errors`` (neurons removed): squared errors of what the branch adds, or
            of the products of queries and keys; ``..._seen`` (probes, 2): some of them with the relative squared error
            of the model's output that was measured for it. ``qk`` and ``v`` (head, channel): how strong channels are
            as they are. With ``settings.statistics`` also the moments.
        model: where it is, where that was said.
    """

    architecture: Architecture
    fingerprint: str
    settings: OneShotSettings
    images: int
    tensors: dict[str, torch.Tensor]
    model: str | None = None

    @classmethod
    @torch.no_grad()
    def measure(
        cls,
        model: Any,
        images: Any,
        settings: OneShotSettings | None = None,
        *,
        name: str | None = None,
        part: str | None = None,
    ) -> OneShotScores:
        """Score a model from unlabelled images: forward passes only; the model is not changed.

        Heads and hidden neurons are put in the order in which the others can best make up for them (optimal brain
        surgeon, arXiv 2203.04466); the errors of values and of queries and keys are those of their best low rank. With
        several processes, all have to call this, with the same data; all get the same scores.

        Args:
            model: stock or pruned, a bigger one with a tower in it, or a PeftModel over one (with its active
                adapters).
            images: unlabelled: anything that ``ImageBatches`` takes, already through the image processor.
            name: where the model is, kept for ``hf-vitprune prune --scores``.
            part: which tower of a bigger model (see :func:`hf_vitprune.towers`), which runs by itself; its only one by
                default.

        Raises:
            UnsupportedModelError: no family is registered for the model, or it is spread over devices.
            InvalidDataError: there are no images, the model does not take them, or its features are not finite.
        """
        check_whole(model)
        settings = settings or OneShotSettings()
        base, architecture = plain_part(model, part)
        architecture.check_looks("one-shot scoring", at_images=False)
        check_weights(model, "one-shot scoring")
        device_of(base, "one-shot scoring")
        form = architecture.family.form(architecture.config)
        images = processed(images, model)
        batches = ImageBatches(images, settings.batch_size, settings.images, shard=shard(), form=form)
        tensors = Measurement(base, batches, settings).run()
        return cls(architecture, fingerprint(base), settings, batches.images, tensors, name)

    # ------------------------------------------------------------------ what follows from them
    def plan(
        self,
        target: float,
        target_metric: str = "macs",
        *,
        units: Sequence[str] = ("heads", "qk", "v", "mlp"),
        round_to: int = 8,
        uniform: bool = False,
        **goal: Any,
    ) -> PruningPlan:
        """The sizes that lose least at a target: among all plans of scored sizes, the least sum of errors.

        It keeps units as they are: ``prune(model, plan, calibration=images)`` or :meth:`compensate` make up for the
            rest.

        Args:
            target: fraction of the model's cost that may remain, in (0, 1).
            target_metric: ``macs``, ``params`` or ``latency``.
            units: what may be removed: any of ``heads``, ``qk``, ``v``, ``mlp``.
            round_to: kept channels and neurons are a multiple of this, or all there are (heads: any number).
            uniform: the same sizes in every layer, q/k as v, of those that a stock class can hold: the small model is
                then a stock one, which loads without this library.
            goal: ``image_size``, ``latency_table``, ``latency_batch_size``, ``allow_other_device`` as in every config.

        Raises:
            UnreachableTargetError: the smallest sizes cost more.
            InvalidConfigError, UnsupportedUnitError, LatencyTableError: impossible settings.
            InvalidPlanError: ``uniform``, and no stock class holds fewer of the units; says why.
        """
        goal |= {"target": target, "target_metric": target_metric, "units": units, "round_to": round_to}
        goal["uniform"] = uniform
        return best_plan(self.architecture, self.tensors, self.settings, goal)

    def compensate(self, model: Any, plan: PruningPlan) -> PruningPlan:
        """The plan with new weights, from the statistics alone: no images, no adapters.

        Every branch is fitted on the dense model's own statistics. With images, ``prune(model, plan,
        calibration=images)`` also makes up for what the layers below lost, and is closer to the dense model.

        Raises:
            InvalidDataError: the model is another one than was scored, or the statistics were not kept.
            InvalidPlanError: the plan removes more than heads, channels and neurons, or carries weights or factors.
        """
        if is_peft(model):
            raise UnsupportedModelError(
                "scores are of the merged weights of a PeftModel: prune it with prune(model, plan, calibration=images)"
            )
        self.check(model)
        if not self.settings.statistics:
            raise InvalidDataError(
                "these scores were measured without statistics: measure them again with statistics=True, or pass "
                "images to prune(model, plan, calibration=images)"
            )
        return rebuilt(plain_part(model, plan.part)[0], plan, self.tensors, self.settings)

    def check(self, model: Any) -> None:
        """Refuse another model than the one that was scored."""
        base, architecture = plain_part(model, self.architecture.part)
        if not self.architecture.fits(architecture):
            raise InvalidDataError(
                f"the scores are of a {self.architecture.model_type} of {len(self.architecture.layers)} layers and "
                f"width {self.architecture.hidden_size} with its own layer sizes, not of this "
                f"{architecture.model_type} of {len(architecture.layers)} layers and width {architecture.hidden_size}"
            )
        if fingerprint(base) != self.fingerprint:
            raise InvalidDataError(
                "the scores are of a model of this shape with other weights (another checkpoint, dtype, or one that "
                "was trained since): measure them for this one"
            )

    # ------------------------------------------------------------------ files
    def save(self, path: str | Path) -> Path:
        """Write a safetensors file."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {
            "version": FORMAT_VERSION,
            "architecture": self.architecture.to_dict(),
            "fingerprint": self.fingerprint,
            "settings": asdict(self.settings),
            "images": self.images,
            "model": self.model,
        }
        write_scores(path, self.tensors, _RECORD, record)
        return path

    @classmethod
    def load(cls, path: str | Path) -> OneShotScores:
        """Read what :meth:`save` wrote.

        Raises:
            InvalidDataError: the file is damaged or something else.
            OSError: there is no such file.
        """
        try:
            record, tensors = read_scores(path, _RECORD)
            if record["version"] != FORMAT_VERSION:
                raise InvalidDataError(
                    f"{path} has version {record['version']!r}, this library reads {FORMAT_VERSION}"
                )
            return cls(
                Architecture.from_dict(record["architecture"]),
                record["fingerprint"],
                OneShotSettings(**record["settings"]),
                record["images"],
                tensors,
                record["model"],
            )
        except InvalidDataError:
            raise
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise InvalidDataError(f"{path} is no file of one-shot scores: {error!r}") from error


def fingerprint(model: Any) -> str:
    """Digest of names, kinds and values of a model's weights."""
    digest = hashlib.sha256()
    state = StateDict(model)
    for name in sorted(state):
        tensor: Any = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
