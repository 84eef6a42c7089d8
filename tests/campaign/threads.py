"""Threads that generate, save, load, fork and close one model at once, for ThreadSanitizer.

    python tests/campaign/threads.py MODEL ROUNDS

Exit code 0 where every answer is what one thread alone gets. tests/sanitize.sh runs it on a module
that is built with ThreadSanitizer, which adds its own exit code where it saw a race.
"""

import sys
import tempfile
import threading
from pathlib import Path

import flashmoe


def main(directory: Path, rounds: int) -> None:
    with flashmoe.Model(directory, threads=2, cache=0) as model:
        expected = ids(model)
    wrong: list[object] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            model = flashmoe.Model(directory, threads=3, cache=number % 2)
            state = model.new_state()
            list(model.generate([4, 5], max_tokens=2, state=state))

            def work(
                name: str, model: flashmoe.Model = model, state: flashmoe.State = state
            ) -> None:
                path = Path(folder) / "a.state"
                try:
                    while True:
                        if name == "generate" and (found := ids(model)) != expected:
                            wrong.append(found)
                        elif name == "save":
                            state.fork().save(path)
                            flashmoe.State.load(model, path)
                        elif name == "logits":
                            model.logits([1, 2, 3] * 30)
                        elif name == "stats":
                            _ = model.stats, model.layer_times()
                except flashmoe.StateError:
                    pass  # closed

            names = ["generate", "generate", "save", "logits", "stats"]
            threads = [threading.Thread(target=work, args=(name,)) for name in names]
            for thread in threads:
                thread.start()
            threads[0].join(0.3)
            model.close()
            for thread in threads:
                thread.join()
    if wrong:
        raise SystemExit(f"other tokens: {wrong[:3]}, expected {expected}")


def ids(model: flashmoe.Model) -> list[int]:
    tokens = model.generate([1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True)
    return [token.id for token in tokens]


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
