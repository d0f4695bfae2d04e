"""What a run writes down while it trains: a CSV file, TensorBoard events and a picture."""

from __future__ import annotations

from dataclasses import asdict

from gam_fused.cli.history import History, write_csv
from gam_fused.cli.plots import plot_runs
from gam_fused.cli.run_folder import RunFolder
from gam_fused.cli.trainer import StepReport

STEPS_BETWEEN_EVENTS = 50


class RunLog:
    """Keeps a run folder's logs in step with the history.

    The CSV and the picture are rewritten from the whole history each time, so they agree with the checkpoint that a
    run resumes from, whenever the previous process died. TensorBoard's files can only be appended to: on resuming, the
    writer tells TensorBoard to disregard what came after ``step``, the last step in the checkpoint.
    """

    def __init__(self, folder: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        self._events = SummaryWriter(str(folder.events), purge_step=step + 1)

    def step_done(self, report: StepReport) -> None:
        if report.step % STEPS_BETWEEN_EVENTS != 0:
            return
        self._events.add_scalar("step/loss", report.loss(), report.step)
        self._events.add_scalar("step/lr", report.lr, report.step)
        self._events.add_scalar("step/seconds", report.step_seconds(), report.step)
        flatness = report.flatness()
        if flatness is not None:
            self._events.add_scalar("step/first_order_flatness", flatness, report.step)

    def epoch_done(self, history: History) -> None:
        record = history[-1]
        for name, value in asdict(record).items():
            if value is not None and name not in ("epoch", "step"):
                self._events.add_scalar(f"epoch/{name}", value, record.step)
        self._events.flush()
        self.rewrite(history)

    def rewrite(self, history: History) -> None:
        """Write the CSV and the picture of ``history``."""
        write_csv(history, self._folder.log)
        plot_runs([(self._folder.path.name, history)], self._folder.picture)

    def close(self) -> None:
        self._events.close()
