"""Every error a user can cause: one class per stage, each saying what is wrong, where, and what is allowed."""

from __future__ import annotations


class LpsnError(Exception):
    """Base of all errors that this package raises on purpose.

    Parameters
    ----------
    message : str
        What is wrong and what is allowed.
    where : str, optional
        The node, layer, option or file that it is about; printed in front of the message.
    """

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(f"{where}: {message}" if where else message)
        self.where = where


class RecipeError(LpsnError):
    """An option of the build is out of range, unknown, or contradicts another."""


class ModelError(LpsnError):
    """The model cannot be read, is malformed, or has shapes that are not fixed."""


class UnsupportedOpError(ModelError):
    """The model has an operator that cannot be imported; names node, operator and domain."""


class CalibrationError(LpsnError):
    """The calibration data is empty, of the wrong shape or type, or not finite."""


class PruneError(LpsnError):
    """Channel removal was asked for something the graph does not allow."""


class QuantizeError(LpsnError):
    """Quantization was asked for something that the arithmetic or the backend does not allow."""


class TargetError(LpsnError):
    """The target is unknown or cannot run what was asked."""


class VtaProgramError(LpsnError):
    """An accelerator program breaks a rule of the hardware; names the instruction, its disassembly and the rule."""


class CompileError(LpsnError):
    """Lowering or compiling failed; names the pass or operator and keeps the cause."""


class TuningError(LpsnError):
    """Tuning cannot be done here, or a file of tuning records cannot be read."""


class ArtifactError(LpsnError):
    """A saved module cannot be read: wrong digest, newer format, missing CPU feature, truncated file."""
