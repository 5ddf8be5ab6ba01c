"""One tree of errors. Each message says what was asked, what was found, and what to try."""


class FewedgesError(Exception):
    """The root: everything this package raises on purpose."""

    def __init__(self, asked: str, found: str, hint: str):
        self.asked, self.found, self.hint = asked, found, hint
        super().__init__(f"{asked}: {found}. Try: {hint}")


class RecipeError(FewedgesError, ValueError):
    """A configuration value is out of range, unknown, or contradicts another."""


class DataError(FewedgesError, ValueError):
    """Text, pairs or tokens cannot be read, or are not what the model needs."""


class ModelError(FewedgesError, ValueError):
    """A model cannot be found, or cannot be made sparse as it is."""


class ProbeError(ModelError):
    """A self-check failed: the model in memory is not the model that was meant."""


class StoreError(FewedgesError, OSError):
    """A saved folder is damaged, foreign, or newer than this version."""


class TrainingError(FewedgesError, RuntimeError):
    """Training cannot go on: a number is not finite, or memory is out."""


class Interrupted(FewedgesError, KeyboardInterrupt):
    """A signal stopped the run after its state was saved; `code` is the process exit code."""

    def __init__(self, asked: str, found: str, hint: str, code: int = 130):
        super().__init__(asked, found, hint)
        self.code = code
