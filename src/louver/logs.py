"""Where the metrics of training go, epoch by epoch: a file of lines, TensorBoard, MLflow. None of them is required."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from louver.errors import ConfigError, MissingExtraError
from louver.types import Log

__all__ = ["logging_to"]


@contextmanager
def logging_to(
    name: str, *, lines: Path | None = None, tensorboard: Path | None = None, mlflow: str | None = None
) -> Iterator[Log]:
    """A log that writes to each place that is named; they are closed at the end, however it comes.

    lines: one JSON object an epoch is appended. tensorboard: a folder of event files. mlflow: the address of a server,
    or sqlite:///FILE; the run is called `name`, and ends as FINISHED, as KILLED when interrupted, or as FAILED.

    Raises:
        MissingExtraError: TensorBoard or MLflow is asked for and not installed.
        ConfigError: MLflow cannot begin a run there.
    """
    logs: list[Log] = []
    with ExitStack() as stack:
        if lines is not None:
            lines.parent.mkdir(parents=True, exist_ok=True)
            logs.append(lambda epoch, figures: _append(lines, epoch, figures))
        if tensorboard is not None:
            logs.append(stack.enter_context(_tensorboard(tensorboard)))
        if mlflow is not None:
            logs.append(stack.enter_context(_mlflow(mlflow, name)))
        yield lambda epoch, figures: _all(logs, epoch, figures)


def _all(logs: Sequence[Log], epoch: int, figures: Mapping[str, float]) -> None:
    for log in logs:
        log(epoch, figures)


def _append(path: Path, epoch: int, figures: Mapping[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"epoch": epoch, **figures}) + "\n")


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Log]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    writer: Any = SummaryWriter(str(folder))

    def log(epoch: int, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            writer.add_scalar(figure, value, epoch)
        # Who watches a run of hours, or finds one that was killed, sees every epoch that ended.
        writer.flush()

    try:
        yield log
    finally:
        writer.close()


@contextmanager
def _mlflow(where: str, name: str) -> Iterator[Log]:
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise MissingExtraError("--mlflow needs MLflow: pip install mlflow") from error
    try:
        mlflow.set_tracking_uri(where)
        mlflow.start_run(run_name=name)
    except mlflow.MlflowException as error:
        # The address may hold a password, and MLflow repeats it.
        said = str(error).replace(where, "that address")
        raise ConfigError(f"--mlflow: MLflow cannot begin a run ({said}); name a server or sqlite:///FILE") from None
    # Left to itself MLflow calls every run finished, also one that an error ended.
    status = "FAILED"
    try:
        yield lambda epoch, figures: mlflow.log_metrics(dict(figures), step=epoch)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        mlflow.end_run(status)
