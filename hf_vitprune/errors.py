"""The exceptions of this library: one base class, and each also inherits from the standard exception it refines."""


class VitPruneError(Exception):
    """Base class of every error raised on purpose by this library."""


class UnsupportedModelError(VitPruneError, TypeError):
    """The model is of no registered family, or holds more than a vision encoder."""


class ModelMismatchError(UnsupportedModelError, ValueError):
    """The live model is not what its config and its family say it is."""


class UnsupportedUnitError(VitPruneError, ValueError):
    """The family does not have the unit that was to be removed."""


class InvalidConfigError(VitPruneError, ValueError):
    """A method's or trainer's setting has an impossible value."""


class InvalidPlanError(VitPruneError, ValueError):
    """A plan removes nothing, empties a set, or belongs to another model."""


class NotFiniteError(VitPruneError, ValueError):
    """Weights, a loss or gradients are infinite or no numbers: a training diverged."""


class ScoresError(VitPruneError, ValueError):
    """Scores of units are of another model, lack a set that is to be pruned, or are not finite."""


class InvalidArchitectureError(VitPruneError, ValueError):
    """The sizes of an architecture are impossible, or do not match its own record."""


class TokenGridError(VitPruneError, ValueError):
    """The tokens that reach a convolution mixer do not form the grid of patches of the image."""


class UnreachableTargetError(VitPruneError, ValueError):
    """No plan that respects the floors reaches the requested cost."""


class CheckpointMismatchError(VitPruneError, RuntimeError):
    """The weights of a checkpoint are not those of the architecture that its config states."""


class UnsafeCheckpointError(VitPruneError, ValueError):
    """A checkpoint can only be read by running code that it brings along."""


class NativeExportError(VitPruneError, ValueError):
    """The pruned shape cannot be expressed by a stock transformers class."""


class PortableError(VitPruneError, ValueError):
    """A model holds code or modules that a portable folder cannot bring along."""


class ExportError(VitPruneError, RuntimeError):
    """A model cannot be written in a format, or what was written does not compute what the model does."""


class BenchError(VitPruneError, RuntimeError):
    """A model does not run in a form that is to be timed."""


class AdapterError(VitPruneError, ValueError):
    """A PEFT adapter cannot be carried over to the pruned model, or belongs to another architecture."""


class MissingLabelsError(VitPruneError, ValueError):
    """Training needs labels and the batch has none."""


class MissingGradientsError(VitPruneError, RuntimeError):
    """A method scores by gradients, and there are none when the optimizer is about to step."""


class SparsityError(VitPruneError, ValueError):
    """Weights that should be 2:4 sparse are not, or cannot be stored so."""


class UnsupportedDeviceError(VitPruneError, RuntimeError):
    """The device has no kernels for what was asked."""


class InvalidDataError(VitPruneError, ValueError):
    """A folder or dataset has no usable images and labels."""


class ResumeError(VitPruneError, RuntimeError):
    """A checkpoint was about to restore only part of a model."""


class HubUploadError(VitPruneError, ConnectionError):
    """A push to the Hub did not go through."""


class MissingExtraError(VitPruneError, ImportError):
    """A feature needs a package that is only installed with one of the extras."""


class LatencyTableError(VitPruneError, ValueError):
    """A latency table is damaged, is of another model, device or input, or does not cover the sizes asked for."""
