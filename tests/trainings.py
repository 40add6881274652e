"""Runs ``gi-model train`` in forked processes of its own, several as ranks, and kills some: a script.

On standard input, a JSON list of runs, each with ``arguments``, ``ranks``, ``environment``, and ``kill``: a
file at whose appearance the process is killed. On standard output, the exit codes of each run's ranks.
What a rank says is in ``<run>-<rank>.out``. Everything is imported once; this process computes nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from gi_model import cli
from gi_model.training import module

SECONDS = 90  # of a run, until its processes are killed


def main() -> None:
    """Run what standard input says."""
    print(json.dumps([run(number, **given) for number, given in enumerate(json.load(sys.stdin))]))


def run(
    number: int,
    arguments: list[str],
    ranks: int = 1,
    environment: dict[str, str] | None = None,
    kill: str = "",
) -> list[int]:
    """Exit codes of all ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(environment or {})
            if ranks > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
            os._exit(rank_of_run(f"{number}-{rank}.out", arguments))
        children.append(child)
    codes: dict[int, int] = {}
    deadline = time.monotonic() + SECONDS
    while len(codes) < ranks:
        for child in children:
            if child not in codes:
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    codes[child] = os.waitstatus_to_exitcode(status)
        if (kill and Path(kill).exists()) or time.monotonic() > deadline:
            for child in children:
                if child not in codes:
                    os.kill(child, signal.SIGKILL)
            kill = ""
        time.sleep(0.002)
    return [codes[child] for child in children]


def rank_of_run(output: str, arguments: list[str]) -> int:
    """The exit code; whatever happens, it is said in ``output``."""
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        return cli.main(arguments)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    finally:
        if SYNCS:
            print(f"gradients shared {sum(SYNCS)} times", flush=True)
        sys.stdout.flush()


# What the environment asks for in tests

SYNCS: list[int] = []
begin = module.TrainingModule.on_fit_start


def on_fit_start(self: Any) -> None:
    """``EVAL_NORMS``, as statistics of a batch differ between its halves; and count shared gradients."""
    begin(self)
    if "EVAL_NORMS" in os.environ:
        for part in self.modules():
            if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
                part.eval()
    if self.trainer.world_size > 1:
        model = self.trainer.strategy.model

        def shared(state, bucket):  # type: ignore[no-untyped-def]  # annotations would have to be classes
            SYNCS.append(int(bucket.is_last()))
            summed = torch.distributed.all_reduce(bucket.buffer() / self.trainer.world_size, async_op=True)
            return summed.get_future().then(lambda future: future.value()[0])

        model.register_comm_hook(None, shared)


save, saved = torch.save, []


def slow_save(content: Any, file: Any, *arguments: Any, **options: Any) -> None:
    """``HALF``: the checkpoint of that number is half written when the file ``half-written`` appears."""
    saved.append(1)
    if os.environ.get("HALF") != str(len(saved)):
        save(content, file, *arguments, **options)
        return
    import io

    whole = io.BytesIO()
    save(content, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    Path("half-written").touch()
    time.sleep(SECONDS)


module.TrainingModule.on_fit_start = on_fit_start  # type: ignore[method-assign]
torch.save = slow_save

if __name__ == "__main__":
    main()
