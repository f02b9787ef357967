"""Where metrics of training go: what their readers find there, and how a run that did not end well is called."""

import json
import sys
import types
from pathlib import Path

import pytest
import typer

from louver import cli
from louver.errors import ConfigError, MissingExtraError
from louver.logs import logging_to

FIGURES = {1: {"loss": 0.5, "distance correlation": 0.25}, 2: {"loss": 0.125, "distance correlation": 0.75}}


class WrongError(Exception):
    pass


ENDINGS = {"FINISHED": None, "FAILED": WrongError, "KILLED": KeyboardInterrupt}


def logged(ending=None, **where):
    """Two epochs, and then how it ended."""
    with logging_to("run of two", **where) as log:
        for epoch, figures in FIGURES.items():
            log(epoch, figures)
        if ending is not None:
            raise ending


def ended(ending, **where):
    if ending is None:
        logged(**where)
        return
    with pytest.raises(ending):
        logged(ending, **where)


def test_lines_are_appended_and_read_back(tmp_path):
    for ending in ENDINGS.values():
        ended(ending, lines=tmp_path / "deep/metrics.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "deep/metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": epoch, **figures} for epoch, figures in FIGURES.items()] * len(ENDINGS)


@pytest.mark.parametrize("where", ["tensorboard", "mlflow"])
def test_what_is_not_installed_is_named_and_what_was_open_is_closed(tmp_path, where, monkeypatch):
    boards = with_false_tensorboard(monkeypatch)
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(where, where), None)
    with pytest.raises(MissingExtraError, match=f"--{where} needs .*pip install {where}"):
        logged(**{"tensorboard": tmp_path, where: str(tmp_path)})
    assert [board.calls for board in boards] == ([["close"]] if where == "mlflow" else [])


# The packages themselves, where they are


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_finds_every_figure_at_its_epoch(tmp_path, ending):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    ended(ending, tensorboard=tmp_path / "board")
    found = events.EventAccumulator(str(tmp_path / "board"))
    found.Reload()
    assert set(found.Tags()["scalars"]) == set(FIGURES[1])
    for figure in FIGURES[1]:
        seen = {event.step: event.value for event in found.Scalars(figure)}
        assert seen == {epoch: figures[figure] for epoch, figures in FIGURES.items()}


@pytest.mark.parametrize(("status", "ending"), ENDINGS.items(), ids=ENDINGS)
@pytest.mark.filterwarnings("ignore")
def test_mlflow_finds_the_run_its_figures_and_how_it_ended(tmp_path, monkeypatch, status, ending):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a data base would need more packages
    where = (tmp_path / "runs").as_uri()
    ended(ending, mlflow=where)
    assert mlflow.active_run() is None
    reader = mlflow.MlflowClient(where)
    (run,) = reader.search_runs(["0"])
    assert (run.info.run_name, run.info.status) == ("run of two", status)
    for figure in FIGURES[1]:
        seen = {metric.step: metric.value for metric in reader.get_metric_history(run.info.run_id, figure)}
        assert seen == {epoch: figures[figure] for epoch, figures in FIGURES.items()}


@pytest.mark.filterwarnings("ignore")
def test_where_mlflow_refuses_to_write_is_a_clear_error_without_the_address(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ConfigError, match="MLflow cannot begin a run") as found:
        logged(mlflow="http://someone:secret@127.0.0.1:1")
    assert "secret" not in str(found.value)


# Stand-ins that note what they are called with, where they are not


def with_false_tensorboard(monkeypatch):
    boards = []

    class SummaryWriter:
        def __init__(self, log_dir):
            self.log_dir, self.calls = log_dir, []
            boards.append(self)

        def add_scalar(self, tag, value, step):
            self.calls.append((tag, value, step))

        def flush(self):
            self.calls.append("flush")

        def close(self):
            self.calls.append("close")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return boards


def with_false_mlflow(monkeypatch):
    calls = []
    module = types.ModuleType("mlflow")

    class MlflowException(Exception):  # noqa: N818 - its name there
        pass

    module.MlflowException = MlflowException
    module.set_tracking_uri = lambda uri: calls.append(("uri", uri))
    module.start_run = lambda *, run_name: calls.append(("start", run_name))
    module.log_metrics = lambda metrics, *, step: calls.append((step, metrics))
    module.end_run = lambda status="FINISHED": calls.append(("end", status))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return calls


@pytest.mark.parametrize(("status", "ending"), ENDINGS.items(), ids=ENDINGS)
def test_what_the_writers_are_told(tmp_path, monkeypatch, status, ending):
    calls, boards = with_false_mlflow(monkeypatch), with_false_tensorboard(monkeypatch)
    ended(ending, tensorboard=tmp_path, mlflow="http://127.0.0.1:5000")
    assert calls == [
        ("uri", "http://127.0.0.1:5000"),
        ("start", "run of two"),
        *FIGURES.items(),
        ("end", status),
    ]
    (board,) = boards
    assert board.log_dir == str(tmp_path)
    # Flushed after each epoch, for who watches, and for what is killed.
    of_epochs = [
        call for epoch, figures in FIGURES.items() for call in (*((*pair, epoch) for pair in figures.items()), "flush")
    ]
    assert board.calls == [*of_epochs, "close"]


def test_a_refusal_of_mlflow_says_what_to_do_and_keeps_the_address_to_itself(monkeypatch):
    calls = with_false_mlflow(monkeypatch)
    module = sys.modules["mlflow"]

    def refuse(*, run_name):
        raise module.MlflowException("API request to http://someone:secret@there/api failed")

    module.start_run = refuse
    with pytest.raises(
        ConfigError, match=r"API request to that address/api failed.*; name a server or sqlite"
    ) as found:
        logged(mlflow="http://someone:secret@there")
    assert "secret" not in str(found.value)
    assert [call[0] for call in calls] == ["uri"]


def test_a_broken_threshold_ends_the_program_but_fails_no_run(tmp_path, monkeypatch):
    calls = with_false_mlflow(monkeypatch)

    def show(found, folder, *, as_json):
        raise typer.Exit(1)

    monkeypatch.setattr(cli, "_run", lambda *arguments, **options: None)
    monkeypatch.setattr(cli, "_show", show)
    example = Path(__file__).parents[1] / "examples/streets-siftfunnel.toml"
    monkeypatch.setattr("sys.argv", ["louver", "harden", str(example), "--out", str(tmp_path), "--mlflow", "there"])
    with pytest.raises(SystemExit) as code:
        cli.main()
    assert code.value.code == 1
    assert calls[-1] == ("end", "FINISHED")
