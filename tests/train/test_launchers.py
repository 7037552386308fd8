"""Every way to start a run that docs/scale.md shows starts the same one.

Same samples, same losses, one folder.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.tiny_models import LORA_TUNE, free_port, parsed, with_tune
from tests.helpers.warm_start import serve, stand_in
from vlm_tune.config.load import dump_recipe
from vlm_tune.train.step_trace import read_trace

LAUNCH = Path(__file__).parent.parent.parent / "docs" / "launch"
SFT = ["-m", "vlm_tune.cli", "sft"]


def forms(port: int) -> dict[str, tuple[list[list[str]], dict[str, Any]]]:
    """By name the commands of one job of two processes, one per node, and their engine."""
    python, ddp = sys.executable, {"kind": "ddp"}
    accelerate = [
        python,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--main_process_port",
        str(port),
    ]
    zero2 = {
        "kind": "deepspeed",
        "stage": 2,
        "offload": [],
        "config": {"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}},
    }
    return {
        "processes": ([[python, *SFT, "--processes", "2"]], ddp),
        "nodes": (
            [["env", f"NODE={number}", "sh", str(LAUNCH / "torchrun.sh")] for number in range(2)],
            ddp,
        ),
        "accelerate": (
            [[*accelerate, "--config_file", str(LAUNCH / "accelerate.yaml"), *SFT]],
            zero2,
        ),
        "deepspeed": (
            [
                [
                    python,
                    "-m",
                    "deepspeed.launcher.runner",
                    "--no_local_rank",
                    "--num_gpus",
                    "2",
                    "--master_port",
                    str(port),
                    "--module",
                    *SFT[1:],
                ]
            ],
            ddp,
        ),
    }


@pytest.mark.slow
def test_every_launcher_starts_the_same_run(
    tiny_recipe: Callable[..., str], tmp_path: Path
) -> None:
    """By `--processes` in processes of their own; launchers' ranks are forks of this one.

    They have the environment and the arguments that the launcher gives.
    """
    import deepspeed  # noqa: F401  (here, and not in every fork)

    changes: dict[str, Any] = {
        "train__steps": 2,
        "train__batch_size": 2,
        "train__log_every": 1,
        "data__validation": [],
    }
    (tmp_path / "recipe.yaml").write_text(
        dump_recipe(
            parsed(with_tune(tiny_recipe("causal"), LORA_TUNE), **changes, evaluate__samples=0)
        )
    )
    port = free_port()
    node = {"HEAD": "127.0.0.1", "NODES": "2", "GPUS": "1", "PORT": str(port)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    traces = {}
    for name, (commands, engine) in forms(port).items():
        run = tmp_path / name
        recipe = [str(tmp_path / "recipe.yaml"), "--set", f"output={run}"]
        environment = os.environ | node | {"PATH": path}
        output = tmp_path / f"{name}.txt"
        with stand_in(tmp_path / f"{name}-place") as (server, warm), output.open("w") as file:
            jobs = [
                subprocess.Popen(
                    [*command, *recipe],
                    env=environment | ({} if name == "processes" else warm),
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                for command in commands
            ]
            try:
                count = serve(server, jobs)
            finally:
                for job in jobs:
                    if job.poll() is None:
                        os.killpg(job.pid, signal.SIGKILL)
        assert [job.returncode for job in jobs] == [0] * len(jobs), (
            f"{name}: {output.read_text()[-4000:]}"
        )
        assert count == (0 if name == "processes" else 2), name
        events = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        (environment_event,) = (event for event in events if event["event"] == "environment")
        assert (environment_event["processes"], environment_event["engine"]) == (2, engine)
        assert (run / "result.json").is_file()
        traces[name] = read_trace(run / "stages" / "1-main")
    first = traces["processes"]
    assert [step.step for step in first] == [1, 2]
    for trace in traces.values():
        assert [step.samples for step in trace] == [step.samples for step in first]
        assert [step.loss for step in trace] == pytest.approx(
            [step.loss for step in first], rel=1e-6
        )
