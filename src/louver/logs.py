"""Where the metrics of training go, epoch by epoch: a file of lines, TensorBoard, MLflow. None of them is required."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from louver.errors import MissingExtraError
from louver.types import Log

__all__ = ["logging_to"]


@contextmanager
def logging_to(
    name: str, *, lines: Path | None = None, tensorboard: Path | None = None, mlflow: str | None = None
) -> Iterator[Log]:
    """A log that writes to each place that is named; they are closed at the end.

    lines: one JSON object an epoch is appended. tensorboard: a folder of event files. mlflow: a tracking address or
    folder; the run is called `name`.

    Raises:
        MissingExtraError: TensorBoard or MLflow is asked for and not installed.
    """
    logs: list[Log] = []
    closers: list[Callable[[], None]] = []
    if lines is not None:
        lines.parent.mkdir(parents=True, exist_ok=True)
        logs.append(lambda epoch, figures: _append(lines, epoch, figures))
    if tensorboard is not None:
        log, close = _tensorboard(tensorboard)
        logs.append(log)
        closers.append(close)
    if mlflow is not None:
        log, close = _mlflow(mlflow, name)
        logs.append(log)
        closers.append(close)
    try:
        yield lambda epoch, figures: _all(logs, epoch, figures)
    finally:
        for close in closers:
            close()


def _all(logs: Sequence[Log], epoch: int, figures: Mapping[str, float]) -> None:
    for log in logs:
        log(epoch, figures)


def _append(path: Path, epoch: int, figures: Mapping[str, float]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"epoch": epoch, **figures}) + "\n")


def _tensorboard(folder: Path) -> tuple[Log, Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise MissingExtraError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    writer: Any = SummaryWriter(str(folder))

    def log(epoch: int, figures: Mapping[str, float]) -> None:
        for figure, value in figures.items():
            writer.add_scalar(figure, value, epoch)

    return log, writer.close


def _mlflow(where: str, name: str) -> tuple[Log, Callable[[], None]]:
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise MissingExtraError("--mlflow needs MLflow: pip install mlflow") from error
    mlflow.set_tracking_uri(where)
    mlflow.start_run(run_name=name)

    def log(epoch: int, figures: Mapping[str, float]) -> None:
        mlflow.log_metrics(dict(figures), step=epoch)

    return log, mlflow.end_run
