"""Several processes on the CPU under `accelerate launch`, which starts only one of them unless MPI is there."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys

from diffusion.errors import GazeError

PR_SET_PDEATHSIG = 1  # of Linux' prctl; outlives exec
# A launcher that starts all processes sets one of them.
COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def start_the_others(module: str, words: list[str]) -> None:
    """Replaces this process by torchrun when Accelerate's launcher was asked for more than it started; else returns.

    module, words: of our own command line, `python -m module words`. Raises GazeError when the number asked for cannot
    be found out.
    """
    end_with_the_launcher()
    several_on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_PORT" in os.environ
    if not several_on_cpu or any(count in os.environ for count in COUNTS):
        return
    # The launcher tells where to meet, but not how many; its command line does, or the file that it names.
    line_of_parent = ["ps", "-ww", "-o", "args=", "-p", str(os.getppid())]  # -ww: not cut at 80 letters
    launcher = subprocess.run(line_of_parent, capture_output=True, text=True).stdout
    asked = _asked_for(launcher) if "accelerate" in launcher else 0
    if asked < 1:
        raise GazeError(
            "accelerate starts several processes on the CPU only over MPI",
            f"ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m {module} {' '.join(words)}",
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(asked)]
    os.execv(sys.executable, [*torchrun, "-m", module, *words])


def _asked_for(launcher: str) -> int:
    """How many processes a command line of `accelerate launch` asks for, itself or by its file; 0 when neither says."""
    number = re.search(r"--num[-_]processes[= ](\d+)", launcher)
    if number:
        return int(number[1])
    from accelerate.commands.config.config_args import load_config_from_file

    file = re.search(r"--config[-_]file[= ](\S+)", launcher)
    try:
        return load_config_from_file(file[1] if file else None).num_processes  # without a name, accelerate's own
    except OSError:  # its name has a space
        return 0


def end_with_the_launcher() -> None:
    """On Linux, a process under `accelerate launch` gets SIGTERM when the launcher has ended, which passes no signal on
    to a single one."""
    if "ACCELERATE_MIXED_PRECISION" in os.environ and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
