"""Runs properties against patched copies of the library, each in a process of its own.

As a program it is the parent of these: it imports torch once, and forks for each job that it reads, so that a job costs
the import of the library and the property alone.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

LIMIT = 300  # CPU seconds of a job; a library that never comes back is no reason to wait


class Verdict(NamedTuple):
    """What a property said.

    Attributes:
        found: whether an example failed.
        seconds: of CPU until then, or of all examples; with the import of the library.
        message: the first line of the complaint.
        error: what kept the property from judging: an error of hypothesis, or the time.
    """

    found: bool
    seconds: float
    message: str = ""
    error: str = ""


class Runs(AbstractContextManager["Runs"]):
    """The parent process, for as long as the context lasts."""

    def __enter__(self) -> Runs:
        here = Path(__file__).resolve()
        self._process = subprocess.Popen(
            [sys.executable, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=here.parent.parent,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __call__(self, source: Path, name: str, examples: int = 100, seed: int | None = None) -> Verdict:
        """A property of `kit_properties`, on the library that lies in `source`.

        Args:
            source: a folder with the package in it.
            name: the property.
            examples: how many at most; it ends at the first that fails.
            seed: of the examples; None: the same ones each time.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(source), name, examples, seed]) + "\n")
        self._process.stdin.flush()
        return Verdict(**json.loads(self._process.stdout.readline()))


# The process ---------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Read jobs, fork for each, and write what it found."""
    import hypothesis  # noqa: F401
    import torch

    torch.set_num_threads(1)  # a fork has one
    for line in sys.stdin:
        job = json.loads(line)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _job(write, *job)
        os.close(write)
        with os.fdopen(read, encoding="utf-8") as pipe:
            text = pipe.read()
        _, _, used = os.wait4(child, 0)
        answer = json.loads(text) if text else {"found": False, "error": f"no answer within {LIMIT} s, or a crash"}
        print(json.dumps({**answer, "seconds": used.ru_utime + used.ru_stime}), flush=True)


def _job(pipe: int, source: str, name: str, examples: int, seed: int | None) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
    signal.alarm(10 * LIMIT)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # the answer goes through the pipe
    sys.path.insert(0, source)
    try:
        answer = _judged(name, examples, seed)
    except BaseException:
        answer = {"found": False, "error": traceback.format_exc()}
    os.write(pipe, json.dumps(answer).encode())
    os._exit(0)


def _judged(name: str, examples: int, seed: int | None) -> dict[str, Any]:
    import hypothesis
    import planted_peers  # noqa: F401  # which adds its properties
    from hypothesis import Phase
    from kit_properties import PROPERTIES, run

    options: Any = {"derandomize": seed is None, "database": None, "phases": [Phase.generate]}
    try:
        for stratum in PROPERTIES[name]:
            run(name, stratum, examples, seed=seed, report_multiple_bugs=False, **options)
    except (hypothesis.errors.HypothesisException, NameError, ImportError):  # an error of the property itself
        raise
    except Exception as error:  # whatever it raises, the user is warned
        first = next(iter(str(error).splitlines()), "")
        known = isinstance(error, AssertionError)
        return {"found": True, "message": first if known else f"{type(error).__name__}: {first}"}
    return {"found": False}


if __name__ == "__main__":
    serve()
