"""What flashmoe raises. A message names the file, tensor or argument, and what to do about it."""

_LONGEST = 4000


class FlashMoeError(Exception):
    """Base of everything that flashmoe raises on purpose.

    A message may quote a damaged or foreign file: what a terminal would obey is shown escaped, and
    what is endless is cut.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message, _LONGEST))


def printable(text: object, longest: int) -> str:
    """Text fit to be shown to a person: at most so many characters, all printable or newlines."""
    text = str(text)
    if len(text) > longest:
        text = text[: longest * 3 // 4] + " [...] " + text[-longest // 4 :]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class ArgumentError(FlashMoeError, ValueError):
    """An argument has a value that cannot be used."""


class CheckpointError(FlashMoeError):
    """A checkpoint is damaged, incomplete or of an unsupported kind."""


class DeviceError(FlashMoeError):
    """A GPU is absent, too small, refused a kernel or could not finish its work."""


class OutOfMemoryError(FlashMoeError, MemoryError):
    """The system does not grant the memory; models and states are as they were."""


class ReadError(FlashMoeError, OSError):
    """A weight could not be read while running: short read, I/O error, file gone or changed."""


class WriteError(FlashMoeError, OSError):
    """A file could not be written: no room, an I/O error, or another process is writing it."""


class StateError(FlashMoeError, RuntimeError):
    """A model or state is closed, full, or in use."""


class ContextError(StateError):
    """A prompt is longer than the context.

    Attributes:
        tokens: that the prompt has.
        context: tokens that a sequence may have.
    """

    def __init__(self, message: str, tokens: int, context: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.context = context


class StoppedError(FlashMoeError):
    """A pass ended early because its request was cancelled. Never leaves the package."""
