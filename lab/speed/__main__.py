"""Everything that takes time, beside peers and beside what the machine could do.

python -m lab.speed [--rounds 5] [--out results/speed.json]    about five minutes, one thread

On a machine that does nothing else. Peers take turns in one process; only their ratios, and shares
of the limit, say something beyond this machine.
"""

from lab.tools import cli, flags

if __name__ == "__main__":
    cli.read_first(flags.speed, __doc__)

import os
from pathlib import Path

import torch

from lab.speed import measures, profiles
from lab.speed.peers import olmoe
from lab.speed.report import speed_report
from lab.tools.checks import undisturbed
from lab.tools.files import as_json, write


@undisturbed()
def main(argv) -> int:
    """Measure, write and print -> the exit code."""
    values = flags.speed(argv, __doc__)
    result = measure_all(values["rounds"])
    write(Path(values["out"]), as_json(result, indent=1).encode())
    print(speed_report(result))
    print(f"\nwrote {values['out']}")
    return 0


def measure_all(rounds: int) -> dict:
    """All measurements, as they are stored."""
    olmoe()  # better missed now than later
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would announce itself
    torch.set_num_threads(1)
    machine = measures.Machine()
    rows = [
        measures.training_row(machine, 3 * rounds),
        *measures.generation_rows(machine, rounds),
        *measures.ngd_rows(machine, 2),
        measures.loading_row(machine, rounds),
        measures.tokenizing_row(rounds),
    ]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "machine": {**vars(machine), **versions},
        "rows": rows,
        "layers": measures.layer_rows(machine, rounds),
        "growth": measures.growth(machine, 3),
        "profiles": profiles.step_profiles(),
    }


if __name__ == "__main__":
    cli.program(main)
