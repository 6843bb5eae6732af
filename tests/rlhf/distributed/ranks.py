"""Functions that two gloo processes run together, and their results by rank.

`run_on_ranks(directory, f, g)` forks the processes once; each joins the other and calls f and g with a directory that
they share. They are forks of a process that has imported everything: the imports take a rank longer than most runs.
"""

import contextlib
import importlib
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

from ppo_fast.rlhf import world


def environment(rank, size, port):
    """The variables that torchrun sets."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return {**os.environ, **{name: str(value) for name, value in own.items()}, "OMP_NUM_THREADS": "1"}


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def start_ranks(*arguments, size=2):
    """The processes of `python ARGUMENTS` as torchrun starts them; their output is piped."""
    port, pipe = free_port(), subprocess.PIPE
    command, options = [sys.executable, *map(str, arguments)], {"stdout": pipe, "stderr": pipe, "text": True}
    return [subprocess.Popen(command, env=environment(rank, size, port), **options) for rank in range(size)]


def run_on_ranks(directory, *functions, size=2, timeout=600):
    """[{name: result} of each rank], where a result is what the function of that name returned there."""
    names = [f"{function.__module__}:{function.__name__}" for function in functions]
    multiprocessing.set_forkserver_preload([function.__module__ for function in functions])
    port, end = free_port(), time.monotonic() + timeout
    variables = [environment(rank, size, port) for rank in range(size)]
    ranks = torch.multiprocessing.start_processes(
        main, (directory, names, variables), size, join=False, start_method="forkserver"
    )
    try:
        while not ranks.join(max(0, end - time.monotonic())):
            assert time.monotonic() < end, f"ranks are not through after {timeout} s"
    finally:
        for rank in ranks.processes:
            rank.kill()
    return [pickle.loads(Path(directory, f"rank{rank}.pickle").read_bytes()) for rank in range(size)]


@contextlib.contextmanager
def alone():
    """Within the block this process is a world of one."""
    world._worlds.append(world.World())
    try:
        yield
    finally:
        world._worlds.pop()


def main(rank, directory, names, variables):
    """What each rank does."""
    os.environ.update(variables[rank])
    warnings.simplefilter("error", UserWarning)
    torch.set_num_threads(1)
    found = {}
    with world.join("cpu", 120):
        for name in names:
            module, _, function = name.partition(":")
            shared = Path(directory, function)
            shared.mkdir(exist_ok=True)
            found[function] = getattr(importlib.import_module(module), function)(shared)
    Path(directory, f"rank{rank}.pickle").write_bytes(pickle.dumps(found))
