"""train_toy.py; the second of two processes ends at its fourth step where a file `end` says so."""

import os
from pathlib import Path

import train_toy
from lab.tools import cli

update = train_toy.update


def mortal(*args):
    if args[-1] == 3 and os.environ.get("RANK") == "1" and Path("end").exists():
        os._exit(1)
    return update(*args)


if __name__ == "__main__":
    train_toy.update = mortal
    cli.program(train_toy.main)
