"""The benchmark's configurations in processes of their own, which run one at a time, in turns."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from squeeze.storage.paths import ROOT

WORKER = Path(__file__).with_name("worker.py")


class Process:
    """A configuration in a process of its own, which runs when it is told to; a failure is a result, too."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = dict(spec)
        self.result: dict[str, Any] | None = None
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        # Another environment runs the file: it may lack what this package imports, or hold another version of it.
        other = spec.get("python")
        program = [other, "-P", WORKER] if other else [sys.executable, "-m", "squeeze.bench.worker"]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen(program, text=True, cwd=ROOT, **pipes)

    def turn(self) -> dict[str, Any]:
        """Let it run up to its next pause or its end: what it knows by then, which at its end is its `result`."""
        assert self.process.stdin and self.process.stdout
        try:
            print(json.dumps(self.spec), file=self.process.stdin, flush=True)
            answer = json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            code = self.process.wait()
            self.errors.seek(0)
            reason = self.errors.read()[-200:]
            answer = {"result": {"error": f"ended with code {code}, perhaps for want of memory: {reason}"}}
        if "result" in answer:
            self.result = answer["result"]
            self.process.wait()
        return self.result or answer["known"]

    def stop(self) -> None:
        """End it, wherever it is."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def run(specs: Sequence[dict[str, Any]], shared: dict[str, Any], bar: tqdm) -> Iterator[dict[str, Any]]:
    """Run configurations side by side, one at a time, a turn each; yields each one's record when it ends.

    Args:
        shared: where the `budgets` that squeezed caches measure are noted, for configurations that ask for the same.
    """
    processes = [Process(spec) for spec in specs]
    try:
        while running := [process for process in processes if process.result is None]:
            for process in running:
                spec = process.spec
                bar.set_postfix_str(f"{spec['engine']} {spec['cache']}, {spec['dtype']}, batch {spec['batch_size']}")
                if spec.get("budgets") == "squeezed":
                    spec |= shared
                known = process.turn()
                bar.update()
                if spec["engine"] == "squeeze" and spec["cache"].endswith("squeezed") and "budgets" in known:
                    shared["budgets"] = known["budgets"][0]
                if process.result is not None:
                    kept = {key: value for key, value in spec.items() if key != "tokens"}
                    yield {"spec": kept, "result": process.result}
    finally:
        for process in processes:
            process.stop()


def turns(spec: dict[str, Any]) -> int:
    """The turns that `run` gives a configuration: to load it, then for prefills, decode steps, and what follows."""
    return 1 + spec["rounds"] * (2 + (spec["new_tokens"] - 1) // spec["turn_steps"])
