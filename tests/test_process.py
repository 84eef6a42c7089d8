"""What happens to the whole process: fork, signals, its end, and the end of its memory."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import pytest

import flashmoe

PATIENCE = 120
"""Seconds after which a process is said to hang, on a machine that is busy with others."""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and signals")


def python(code: str, *arguments: object) -> tuple[int, list[str]]:
    """Exit code and printed words of a program; an assertion where it hangs."""
    program = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            out, _ = process.communicate()
            raise AssertionError(f"hangs after {out!r}") from None
    return process.returncode, out.split()


@pytest.fixture(scope="module")
def tiny(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("process") / "tiny"
    maker.make_checkpoint(directory, maker.PRESETS["tiny"])
    return directory


# fork

FORK = """
    import os, sys, threading
    import flashmoe
    model = flashmoe.Model(sys.argv[1], threads=3)
    def ids(model):
        return [t.id for t in model.generate([1, 2, 3], max_tokens=5, temperature=0,
                                             ignore_eos=True)]
    expected = ids(model)
    state = model.new_state()
    def busy():
        while True:
            ids(model)
    if sys.argv[3] == "busy":
        threading.Thread(target=busy, daemon=True).start()
    for _ in range(int(sys.argv[4])):
        child = os.fork()
        if child == 0:
            try:
                {child}
            except flashmoe.StateError as error:
                assert "forked" in str(error), error
                print("refused", flush=True)
            sys.exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert ids(model) == expected
    print("alive", flush=True)
"""
CHILDREN = {
    "ends": ("pass", []),
    "generates": ("ids(model)", ["refused"]),
    "asks for statistics": ("print(model.stats.generated_tokens)", ["5"]),
    "asks for layers' times": ("model.layer_times()", ["refused"]),
    "makes a state": ("model.new_state()", ["refused"]),
    "forks a state": ("state.fork()", ["refused"]),
    "saves a state": ("state.save(sys.argv[2])", ["refused"]),
    "closes": ("model.close(); model.close(); print('closed')", ["closed"]),
    "drops it": ("del model, state; import gc; gc.collect(); print('dropped')", ["dropped"]),
    "opens its own": (
        "own = flashmoe.Model(sys.argv[1], threads=3); print(ids(own) == expected)",
        ["True"],
    ),
}


@pytest.mark.parametrize(("child", "said"), CHILDREN.values(), ids=CHILDREN)
def test_a_forked_child_works_or_is_told_why_not(tiny, tmp_path, child, said) -> None:
    code = FORK.replace("{child}", child)
    assert python(code, tiny, tmp_path / "a.state", "idle", 1) == (0, [*said, "alive"])


@pytest.mark.parametrize("child", ["ends", "generates", "opens its own"])
def test_so_does_one_that_is_forked_while_a_thread_generates(tiny, tmp_path, child) -> None:
    statement, said = CHILDREN[child]
    code = FORK.replace("{child}", statement)
    if said == ["5"] or child == "generates":
        # The thread's generate() may hold what the child asks for.
        said = ["refused"]
    assert python(code, tiny, tmp_path / "a.state", "busy", 3) == (0, [*said * 3, "alive"])


# Signals

SIGNAL = """
    import signal, sys, time
    import flashmoe
    model = flashmoe.Model(sys.argv[1], threads=2, cache=0)
    state = model.new_state()
    list(model.generate([1], max_tokens=0, state=state))
    prompt = [1, 2, 3] * 400
    inside = 0
    def handler(*_):
        global inside
        if inside:
            return
        try:
            model._native.new_state()
            return  # between two calls
        except flashmoe.StateError as error:
            if "in the middle of a call" not in str(error):
                return
        inside += 1
        try:
            {action}
            print("done", flush=True)
        except flashmoe.StateError:
            print("refused", flush=True)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    end = time.monotonic() + 60
    try:
        while not inside and time.monotonic() < end:
            model.logits(prompt)
        print("on", flush=True)
    except flashmoe.StateError as error:
        print("closed" if "closed" in str(error) else error, flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        model.logits([1])
    except flashmoe.StateError:
        print("closed", flush=True)
"""
ACTIONS = {
    "stats": ("model.stats", ["done", "on"]),
    "logits": ("model.logits([1])", ["refused", "on"]),
    "generate": ("list(model.generate([1], max_tokens=1))", ["refused", "on"]),
    "new_state": ("model.new_state()", ["refused", "on"]),
    "fork": ("state.fork()", ["done", "on"]),
    "save": ("state.save('/dev/null')", ["refused", "on"]),
    "close": ("model.close()", ["done", "closed", "closed"]),
}


@pytest.mark.parametrize(("action", "said"), ACTIONS.values(), ids=ACTIONS)
def test_a_signal_handler_in_the_middle_of_a_pass_does_not_wait_for_it(tiny, action, said) -> None:
    assert python(SIGNAL.replace("{action}", action), tiny) == (0, said)


def test_after_ctrl_c_at_any_moment_an_empty_prompt_goes_on(tiny) -> None:
    """Even after the last instruction of a pass, whose result then nobody has."""
    with flashmoe.Model(tiny, threads=2) as model:
        options = {"temperature": 0, "ignore_eos": True}
        expected = [t.id for t in model.generate([5, 6, 7], max_tokens=300, **options)]
        stopped = 0
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            for number in range(60):
                state = model.new_state()
                signal.setitimer(signal.ITIMER_REAL, 0.001 + 0.0004 * number)
                try:
                    list(model.generate([5, 6, 7], max_tokens=2000, state=state, **options))
                except KeyboardInterrupt:
                    stopped += 1
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                if state.position == 0:  # it came before the prompt was taken
                    continue
                before = list(state.tokens[3:])
                assert before == expected[: len(before)]
                after = [t.id for t in model.generate([], max_tokens=3, state=state, **options)]
                assert [*before, *after] == expected[: len(before) + 3]
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
        assert stopped > 30


# The end of the program

DAEMONS = {
    "generates": "list(model.generate([1, 2], max_tokens=50, ignore_eos=True))",
    "computes a long prompt": "model.logits([1, 2, 3] * 500)",
    "loads": "flashmoe.Model(sys.argv[1], threads=2, progress=lambda *_: None)",
    "saves": "model.new_state().save(sys.argv[2])",
    "packs": "pack(sys.argv[1], sys.argv[2] + str(next(number)), group_size=32)",
}


@pytest.mark.parametrize("work", DAEMONS.values(), ids=DAEMONS)
def test_a_daemon_thread_does_not_abort_the_end_of_a_program(tiny, tmp_path, work) -> None:
    code = f"""
        import itertools, sys, threading, time
        import flashmoe
        from flashmoe.pack.pack import pack
        number = itertools.count()
        model = flashmoe.Model(sys.argv[1], threads=2)
        begun = threading.Event()
        def busy():
            while True:
                begun.set()
                {work}
        for _ in range(2):
            threading.Thread(target=busy, daemon=True).start()
        begun.wait()
        time.sleep(float(sys.argv[3]))
        print("done", flush=True)
        sys.exit(3)
    """
    for number in range(4):
        assert python(code, tiny, tmp_path / f"out{number}", 0.05 * number) == (3, ["done"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_closing_ends_threads_and_files(tiny) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    before = count()
    models = [flashmoe.Model(tiny, threads=4) for _ in range(3)]
    states = [model.new_state() for model in models]
    for model, state in zip(models, states, strict=True):
        list(model.generate([1, 2], max_tokens=2, state=state))
    assert count()[0] >= before[0] + 3 * 11
    for model in models:
        model.close()
        model.close()
    assert count() == before
    assert all(state.fork().position for state in states)  # their memory is their own


# The end of memory

SCARCE = """
    import resource, sys
    import flashmoe
    model = flashmoe.Model(sys.argv[1], threads=2, cache=0)
    options = {"temperature": 0, "ignore_eos": True}
    prompt = [1 + i % 500 for i in range(9000)]
    state = model.new_state()
    list(model.generate(prompt[:3000], max_tokens=0, state=state))
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (2 << 20), resource.RLIM_INFINITY))
    try:
        list(model.generate(prompt[3000:], max_tokens=0, state=state))
        print("fits")
    except flashmoe.OutOfMemoryError as error:
        print("keys" if "keys and values of" in str(error) else error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
    print(state.position, state._native.position % model.setting.chunk)
    after = [t.id for t in model.generate([], max_tokens=4, state=state, **options)]
    print(after == [t.id for t in model.generate(prompt, max_tokens=4, **options)])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on address space")
def test_keys_that_no_longer_fit_are_our_error_and_the_state_goes_on(tiny) -> None:
    code, out = python(SCARCE, tiny)
    assert (code, out[0], out[1], out[-1]) == (0, "keys", "9000", "True"), out
