"""What a run writes down while it trains: a CSV file, TensorBoard events and a picture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict

from gam_fused.cli.errors import CommandError
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
        with _one_line(folder):
            self._events = SummaryWriter(str(folder.events), purge_step=step + 1)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # TensorBoard writes in a thread of its own, and says at the next call what went wrong there.
        with suppress(CommandError) if error is not None else nullcontext(), _one_line(self._folder):
            self._events.close()

    def step_done(self, report: StepReport) -> None:
        if report.step % STEPS_BETWEEN_EVENTS != 0:
            return
        values = {
            "loss": report.loss(),
            "lr": report.lr,
            "seconds": report.step_seconds(),
            "first_order_flatness": report.flatness(),
        }
        self._add("step", values, report.step)

    def epoch_done(self, history: History) -> None:
        values = asdict(history[-1])
        del values["epoch"]
        self._add("epoch", values, values.pop("step"))
        with _one_line(self._folder):
            self._events.flush()
        self.rewrite(history)

    def _add(self, kind: str, values: dict[str, float | None], step: int) -> None:
        with _one_line(self._folder):
            for name, value in values.items():
                if value is not None:
                    self._events.add_scalar(f"{kind}/{name}", value, step)

    def rewrite(self, history: History) -> None:
        """Write the CSV and the picture of ``history``."""
        write_csv(history, self._folder.log)
        plot_runs([(self._folder.name, history)], self._folder.picture)


@contextmanager
def _one_line(folder: RunFolder) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{folder.events} cannot be written: {error.strerror}") from error
