import os
import signal
import threading
import time

import pytest
from test_cli import one_line, run, train_args
from tiny import write_files

from fastsiam.training import run as training_run
from fastsiam.training.checkpoint import Checkpoint
from fastsiam.training.run import stop_signals


@pytest.fixture(autouse=True)
def handler():
    """Keeps a signal that comes too late from ending pytest."""

    def ignore(_number, _frame):
        pass

    before = signal.signal(signal.SIGTERM, ignore)
    yield ignore
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path / "data")


def test_sigterm_ends_with_143_and_resume_goes_on(files, tmp_path, handler):
    out = tmp_path / "run"

    def terminate():
        while len(Checkpoint(out / "checkpoints").files()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    args = train_args(files, out, epochs=100_000)
    thread = threading.Thread(target=terminate)
    thread.start()
    result = run(*args, "--resume")
    thread.join()
    line = one_line(result, 143)
    assert line.startswith("fastsiam: terminated; the model of epoch")
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "resume: epochs must be" in one_line(run(*train_args(files, out), "--resume"), 2)
    newest, before = Checkpoint(out / "checkpoints").files()
    newest.write_bytes(b"")
    thread = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    thread.start()
    result = run(*args, "--resume")
    assert result.exit_code == 143
    warning, last = result.stderr.splitlines()
    assert warning.startswith(f"fastsiam: {newest}: ")
    assert warning.endswith(f"going on from {before.name}")
    assert "terminated" in last
    assert "resumed: " in result.stdout


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_dev_is_scored_ends_the_whole_recipe(
    files, tmp_path, monkeypatch, number, code
):
    scored, score_pairs = 0, training_run.score_pairs

    def kill(*args):
        nonlocal scored
        scored += 1
        if scored == 2:  # of the last epoch of the first member
            os.kill(os.getpid(), number)
        return score_pairs(*args)

    monkeypatch.setattr(training_run, "score_pairs", kill)
    args = train_args(files, tmp_path / "run", epochs=2, ensemble=2)
    assert "--resume goes on" in one_line(run(*args), code)
    assert [path.name for path in (tmp_path / "run" / "members").iterdir()] == ["0"]
    result = run(*args, "--resume")
    assert result.exit_code == 0
    assert "resumed: 2 epochs" in result.stdout


def test_a_signal_that_nobody_asked_for_acts_at_the_end():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop() == signal.SIGINT


def test_an_interrupted_demo_promises_nothing(tmp_path, handler):
    out = tmp_path / "demo"

    def terminate():
        while not (out / "run" / "checkpoints").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    result = run("demo", "--out", out)
    thread.join()
    # it has no --resume, and without --out its folder is gone
    assert one_line(result, 143) == "fastsiam: terminated\n"
