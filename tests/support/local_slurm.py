"""A SLURM of this host's own, and its jobs, for tests."""

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "local_slurm.sh"
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
}


def is_installed() -> bool:
    """Whether this machine has the daemons."""
    path = f"{os.environ['PATH']}:/usr/sbin"
    return all(shutil.which(name, path=path) for name in ("slurmctld", "slurmd", "munged"))


@dataclass
class LocalSlurm:
    """A running cluster of ``nodes`` nodes n1, n2, ...; its jobs run with the environment given at submission."""

    folder: Path
    nodes: int

    @property
    def environment(self) -> dict[str, str]:
        """What a shell of a login node of this cluster has; no variable of torchrun's or of another job."""
        foreign = ("SLURM_", "SBATCH_", "SRUN_", "RMOE_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        kept |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        return kept | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

    def run(
        self, *command: str, cwd: Path | None = None, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, that is here."""
        environment = self.environment | variables
        return subprocess.run(
            command, env=environment, cwd=cwd or self.folder, capture_output=True, text=True, timeout=120
        )

    def submit(self, *command: str, cwd: Path | None = None, **variables: str) -> str:
        """Run a command that submits a job and prints ``Submitted batch job N``; returns N."""
        done = self.run(*command, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr + done.stdout
        return next(line for line in done.stdout.splitlines() if "Submitted batch job" in line).split()[-1]

    def describe(self, job: str) -> dict[str, str]:
        """Return what scontrol says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 480) -> str:
        """Wait until a job has one of ``states``, by default an end; returns its state."""
        wanted, deadline = set(states) or ENDED, time.monotonic() + timeout
        while (state := self.describe(job)["JobState"]) not in wanted:
            assert state not in ENDED, f"job {job} is {state}: {self.describe(job)}"
            assert time.monotonic() < deadline, (
                f"job {job} is {state} after {timeout} s: {self.describe(job)}"
            )
            time.sleep(0.2)
        return state

    def signal(self, job: str, *options: str) -> None:
        """Send a signal with scancel's options, say ``--signal=USR1``."""
        done = self.run("scancel", *options, job)
        assert done.returncode == 0, done.stderr

    def kill_daemon(self, node: str) -> None:
        """Kill -9 the slurmd of a node and the slurmstepd of its steps; the steps' processes live on."""
        daemon = int((self.folder / "run" / f"slurmd.{node}.pid").read_text())
        steps = [
            process.pid
            for process in psutil.process_iter(["name"])
            if process.info["name"] == "slurmstepd"
            and psutil.Process(process.pid).environ().get("SLURMD_NODENAME") == node
        ]
        for process in (daemon, *steps):
            os.kill(process, signal.SIGKILL)

    def start_daemon(self, node: str) -> None:
        """Start the slurmd of a node again and wait until SLURM knows it."""
        path = f"{os.environ['PATH']}:/usr/sbin"
        assert self.run("slurmd", "-N", node, PATH=path).returncode == 0
        for _ in range(300):
            if self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%t").stdout.strip() == "idle":
                return
            time.sleep(0.2)
        raise AssertionError(f"{node} did not come up")


def start(folder: Path, nodes: int = 2, cpus: int = 2, gpus: int = 0) -> LocalSlurm:
    """Start a cluster whose state lies in ``folder``; its GPUs are in name only."""
    subprocess.run(
        ["bash", str(SCRIPT), "start", str(folder), str(nodes), str(cpus), str(gpus)], check=True, timeout=120
    )
    return LocalSlurm(folder, nodes)


def stop(slurm: LocalSlurm) -> None:
    """End a cluster and its jobs."""
    subprocess.run(["bash", str(SCRIPT), "stop", str(slurm.folder)], check=True, timeout=120)
