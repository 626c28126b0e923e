"""Every error that a user can cause: what came, what was expected, what to do."""


class ShapwrapError(Exception):
    """Base of all errors that shapwrap raises on purpose."""


class BackboneTypeError(ShapwrapError, TypeError):
    """What was given to wrap is not a model that can be wrapped (a class, a wrapped model)."""


class UnsupportedBackboneError(ShapwrapError, ValueError):
    """No adapter reproduces the model's own forward pass from its parts."""


class MissingHeadError(ShapwrapError, ValueError):
    """The model has no classifier and no `head=` was given."""


class ReadoutError(ShapwrapError, ValueError):
    """The pretrained head cannot be read patch by patch in the way that was asked for."""


class MaskingError(ShapwrapError, ValueError):
    """The masking asked for would be wrong for this backbone."""


class GridError(ShapwrapError, ValueError):
    """The backbone cannot have the patch grid that was asked for."""


class ImageError(ShapwrapError, ValueError):
    """The images have a shape, a size or values that cannot be used."""


class ImageTypeError(ShapwrapError, TypeError):
    """The images are not a floating-point tensor."""


class CoalitionError(ShapwrapError, ValueError):
    """The coalitions have the wrong shape or number."""


class CoalitionTypeError(ShapwrapError, TypeError):
    """The coalitions are not a boolean tensor."""


class EstimationError(ShapwrapError, RuntimeError):
    """Shapley values cannot be estimated from the coalitions that were evaluated."""


class TargetError(ShapwrapError, ValueError):
    """A target class that the model does not have."""


class MapError(ShapwrapError, ValueError):
    """The maps to measure have a shape or values that cannot be used."""


class ArgumentError(ShapwrapError, ValueError):
    """An option outside its range."""


class PlotError(ShapwrapError, ValueError):
    """The images cannot be drawn in their true colours with what is known."""


class MissingDependencyError(ShapwrapError, ImportError):
    """An optional package is needed and not installed."""


class TrainingError(ShapwrapError, RuntimeError):
    """Training cannot start, or has to stop."""


class CheckpointError(TrainingError):
    """A checkpoint cannot be written, or not be used: damaged, tampered with, of another format."""


class DataWorkerError(TrainingError):
    """A process that loads data has died."""


class ExportError(ShapwrapError, RuntimeError):
    """A wrapped model cannot be exported, or its export does not compute the same numbers."""


class ImageFileError(ShapwrapError, OSError):
    """A file cannot be read as an image."""


class ConfigurationError(ShapwrapError, ValueError):
    """A configuration file says something that cannot be meant."""


class SavedModelError(ShapwrapError, ValueError):
    """A model cannot be saved so, or a saved one not be loaded: damaged, changed, unknown."""
