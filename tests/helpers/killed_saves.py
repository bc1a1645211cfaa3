"""A program that saves over a saved folder and is killed at its n-th call to the operating system.

usage: killed_saves.py FOLDER; prints a line `n status` for n = 1, 2, ... until a save completes.
After each save, FOLDER is copied to FOLDER-n for the caller to check.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch

from tests.helpers.netmaking import plain_merge
from tests.helpers.nets import NETS

WATCHED = ("open", "os.", "shutil.", "tempfile.", "ctypes.dlsym", "ctypes.call")


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    model, x = NETS["residual"]()
    old, new = (plain_merge(model, x, ratio=ratio) for ratio in (0.25, 0.5))
    for limit in range(1, 500):
        old.save(folder)
        child = os.fork()
        if not child:
            count = 0

            def kill(event: str, _: object) -> None:
                nonlocal count
                if event.startswith(WATCHED):
                    count += 1
                    if count == limit:  # noqa: B023
                        os.kill(os.getpid(), 9)

            sys.addaudithook(kill)
            new.save(folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(limit, status, flush=True)
        shutil.copytree(folder, f"{folder}-{limit}")
        if not status:
            break


main()
