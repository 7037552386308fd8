"""Steps whose loss or gradient is not finite: some are skipped, too many end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from vlm_tune.errors import TrainingError
from vlm_tune.events import Note, StageReport
from vlm_tune.quoting import name_list
from vlm_tune.train.step_trace import json_number


class NonFinitePolicy:
    """Decides whether a step may be taken, and counts consecutive steps that may not (`in_a_row`).

    `most` such steps in a row end the run. If the engine can't skip a step (`skips` is False), the
    first one does.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        report: StageReport,
        *,
        most: int,
        skips: bool,
    ) -> None:
        self.accelerator = accelerator
        self.report = report
        self.most = most
        self.skips = skips
        self.in_a_row = 0

    def allows(
        self,
        step: int,
        loss: float,
        norm: float | None,
        ids: list[str],
        folder: Path,
        *,
        last: bool,
    ) -> bool:
        """Whether the step may be taken: its loss and its gradient's norm are finite.

        Every process must call it. The samples of a refused step are added to nonfinite.jsonl.

        Args:
            step: Number of the step.
            loss: Loss summed over all processes.
            norm: Norm of the gradient, None where the engine does not report it.
            ids: Ids of this process's samples.
            folder: Folder of the stage.
            last: Whether it is the last step.

        Raises:
            TrainingError: If too many steps in a row, or the last step, are not finite.
        """
        if math.isfinite(loss) and (norm is None or math.isfinite(norm) or self._overflowed()):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        samples = [identity for part in gather_object([ids]) for identity in part]
        path = folder / "nonfinite.jsonl"
        if self.accelerator.is_main_process:
            with path.open("a") as file:
                file.write(
                    json.dumps(
                        {
                            "step": step,
                            "loss": json_number(loss),
                            "norm": norm and json_number(norm),
                            "samples": samples,
                        }
                    )
                    + "\n"
                )
        what = (
            f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        )
        message = f"{what} at step {step}; the batch holds {name_list(samples, 8)}"
        if self.skips and self.in_a_row < self.most and not last:
            self.report(Note(f"{message}; the step is skipped", step))
            return False
        row = f", the {self.in_a_row}th such step in a row" if self.in_a_row > 1 else ""
        raise TrainingError(
            f"{message} (all of them in {path}){row}. A lower learning rate, more warm-up or "
            "bf16 may help; the last checkpoint is from before: --resume continues there",
            by_recipe=True,
        )

    def _overflowed(self) -> bool:
        """Whether a gradient that is not finite may be an overflow of fp16, by its scale.

        Such overflows are usual: the gradient scaler skips the step and halves its scale. With a
        scale below 1 the gradient itself is too large or NaN.
        """
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() >= 1
