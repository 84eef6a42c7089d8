"""The `flashmoe` program, which `python -m flashmoe` is too."""

import _signal as signal  # type: ignore[import-not-found]  # without what `signal` imports
import os


def main() -> None:
    """Runs the program. Ctrl-C ends it quietly while what it needs is imported, too."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _stop)
    # Files would be opened in the place of a stream that is closed, and be written to.
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    from flashmoe.cli.main import run  # noqa: PLC0415

    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, before)
    code = run()
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
    raise SystemExit(code)


def _stop(*_: object) -> None:
    os._exit(130)


if __name__ == "__main__":
    main()
