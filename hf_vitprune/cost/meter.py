"""One interface for every kind of cost that a target can count: of a model, of one layer, and as a fraction."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ..spec.architecture import Architecture
from ..spec.layer_shape import LayerShape
from .closed_form import layer_parts
from .skeleton import Part, outside

ImageSize = int | tuple[int, int] | None


class CostMeter(ABC):
    """Cost of architectures like ``reference``: the sum over its layers, and of what lies outside them.

    Made for searches: the cost of a layer depends on its own sizes, the residual width and its stage only, and is
    remembered, so that asking again for a model that differs in one layer costs a few look-ups.
    """

    #: ``macs``, ``params`` or ``latency``
    metric: str

    def __init__(self, reference: Architecture) -> None:
        self.reference = reference
        self._layers: dict[tuple[LayerShape, int, int], float] = {}
        self._outer: dict[int, float] = {}
        self._reference_cost: float | None = None

    # ------------------------------------------------------------------ parts
    def layer(self, shape: LayerShape, width: int, kind: int = 0) -> float:
        """Cost of one layer, in the metric's unit (multiply-adds an image, parameters, seconds a batch).

        ``width``: ``architecture.width(i)``. ``kind``: ``architecture.kinds[i]``; 0 where all layers are alike.
        """
        key = (shape, width, kind)
        if key not in self._layers:
            self._layers[key] = self._layer_cost(shape, width, kind)
        return self._layers[key]

    def outer(self, hidden_size: int) -> float:
        """Cost of everything outside the layers (embedding, norms, head) at a residual width, in the same unit."""
        if hidden_size not in self._outer:
            self._outer[hidden_size] = self._outer_cost(hidden_size)
        return self._outer[hidden_size]

    @abstractmethod
    def _layer_cost(self, shape: LayerShape, width: int, kind: int) -> float: ...

    @abstractmethod
    def _outer_cost(self, hidden_size: int) -> float: ...

    # ------------------------------------------------------------------ whole models
    def total(self, architecture: Architecture) -> float:
        """Cost of a model of the reference's kind, in the metric's unit."""
        layers = (
            self.layer(shape, architecture.width(i), kind)
            for i, (shape, kind) in enumerate(zip(architecture.layers, architecture.kinds, strict=True))
        )
        return sum(layers) + self.outer(architecture.hidden_size)

    def ratio(self, architecture: Architecture) -> float:
        """Cost as a fraction of the reference's."""
        if self._reference_cost is None:
            self._reference_cost = self.total(self.reference)
        return self.total(architecture) / self._reference_cost


class ClosedFormMeter(CostMeter):
    """Multiply-adds or parameters."""

    def __init__(self, metric: str, reference: Architecture, image_size: ImageSize = None) -> None:
        super().__init__(reference)
        self.metric = metric
        self._image_size = reference.checked_size(image_size)
        self._grid = reference.family.grid(reference.config, self._image_size)

    def _layer_cost(self, shape: LayerShape, width: int, kind: int) -> float:
        return sum(map(self._amount, layer_parts(self.reference, shape, width, kind, self._grid)))

    def _outer_cost(self, hidden_size: int) -> float:
        return self._amount(outside(self.reference, hidden_size, self._image_size))

    def _amount(self, part: Part) -> int:
        return part.macs if self.metric == "macs" else part.weights + part.others
