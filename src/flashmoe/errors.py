"""What flashmoe raises. A message names the file, tensor or argument, and what to do about it."""


class FlashMoeError(Exception):
    """Base of everything that flashmoe raises on purpose."""


class ArgumentError(FlashMoeError, ValueError):
    """An argument has a value that cannot be used."""


class CheckpointError(FlashMoeError):
    """A checkpoint is damaged, incomplete or of an unsupported kind."""


class DeviceError(FlashMoeError):
    """A GPU is absent, too small, refused a kernel or could not finish its work."""


class ReadError(FlashMoeError, OSError):
    """A weight could not be read while running: short read, I/O error, file gone or changed."""


class WriteError(FlashMoeError, OSError):
    """A file could not be written: no room, an I/O error, or another process is writing it."""


class StateError(FlashMoeError, RuntimeError):
    """A model or state is closed, full, or in use."""


class StoppedError(FlashMoeError):
    """A pass ended early because its request was cancelled. Never leaves the package."""
