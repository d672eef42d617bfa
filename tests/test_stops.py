"""Stop signals: where a run of flux_distill.py ends, what it says, and what is kept."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from faults import before_network_calls
from safetensors.torch import load_file
from tiny_runs import content, copied, fd, run, same_run, says

STOPPED = "stopped; what is in --out .* is kept, and the same command resumes"


@pytest.fixture(autouse=True)
def restored_handlers(done):
    """Handlers of our own, which are there again afterwards, and which no stop has reached."""
    reached = []

    def ours(kind, frame):
        reached.append(kind)

    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, ours) for kind in kinds]
    yield
    after = [signal.getsignal(kind) for kind in kinds]
    for kind, handler in zip(kinds, before):
        signal.signal(kind, handler)
    assert after == [ours] * 3
    assert reached == []


# ---------------------------------------------------------------------------------- during training


@pytest.mark.parametrize("last", [1, 4])
def test_a_stop_during_an_iteration_stops_after_it(done, tmp_path, last):
    """Also during the last. The same command then comes to the same end."""
    out = tmp_path / "out"
    iterations = []

    def stop_in_the_last():
        if torch.is_grad_enabled():  # the student's call, of which an iteration has one
            iterations.append(len(iterations) + 1)
            if iterations[-1] == last:
                os.kill(os.getpid(), signal.SIGTERM)

    with before_network_calls(stop_in_the_last):
        says(f"stopped after iteration {last}; the same command resumes there", "--out", out)
        assert not (out / fd.LORA).exists()
        run(out)
    assert iterations == [1, 2, 3, 4]
    assert same_run(out, done)


def test_a_stopped_run_can_end_with_what_there_is(done, tmp_path):
    """As if no more had been asked for; with more iterations it then trains on, as if it never had
    ended."""
    out = tmp_path / "out"

    def stop_in_the_third():
        if torch.is_grad_enabled():
            stop_in_the_third.calls += 1
            if stop_in_the_third.calls == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    stop_in_the_third.calls = 0
    with before_network_calls(stop_in_the_third):
        says("stopped after iteration 3; .*, with --iterations 3 it ends", "--out", out)
    run(out, "--iterations", 1)
    run(tmp_path / "three", "--iterations", 3)
    tensors = [load_file(folder / fd.LORA) for folder in (out, tmp_path / "three")]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert fd.read_metadata(out / fd.LORA)["iterations"] == 3
    assert "after 3 iterations" in (out / "README.md").read_text()

    run(out)
    tensors = [load_file(folder / fd.LORA) for folder in (out, done)]
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert fd.read_metadata(out / fd.LORA)["iterations"] == 4
    assert fd.read_metadata(out / fd.LORA)["scales"] == fd.read_metadata(done / fd.LORA)["scales"]


def test_a_run_that_stops_when_matched_keeps_its_iterations(tmp_path):
    """They decide which validations it compares."""
    matched = ("--out", tmp_path, "--stop-when-matched", "--validate-every", 1)
    run(tmp_path, *matched, "--iterations", 2)
    says("--iterations 2, now 3", *matched, "--iterations", 3)


def test_a_hang_up_of_the_terminal_ends_after_the_iteration_too():
    """Then nothing can be written to it any more."""
    reading, writing = os.pipe()
    os.close(reading)
    stderr = os.dup(2)
    os.dup2(writing, 2)
    try:
        with fd.interruptible() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked == [True]
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writing)


def test_a_stop_during_a_validation_ends_at_once(done, tmp_path, monkeypatch):
    """Its iteration is saved; the validation is repeated."""
    out = tmp_path / "out"

    def stopping(self, weights, path):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("it continued")

    with monkeypatch.context() as patch:
        patch.setattr(fd.Validation, "report", stopping)
        says(STOPPED, "--out", out)
    rows = fd.read_metadata(out / fd.STATE)["rows"]
    assert len(rows) == 2
    assert "rmse" not in rows[-1]
    run(out)
    assert same_run(out, done)


# ------------------------------------------------------------------------------ outside of training


TRAINING = ("results.json", fd.LORA, fd.STATE)


@pytest.mark.parametrize(
    ("owner", "function", "kind", "forgotten"),
    [
        pytest.param(fd, "fingerprint", "SIGINT", (), id="set-up"),
        pytest.param(fd.Flux, "encode_text", "SIGTERM", (*TRAINING, "cache/text-*"), id="texts"),
        pytest.param(fd.sc, "euler_sample", "SIGINT", (*TRAINING, "cache/latent-*"), id="latents"),
        pytest.param(fd, "Validation", "SIGHUP", TRAINING, id="before training"),
        pytest.param(fd, "calibrate", "SIGTERM", ("results.json", fd.CHECK), id="calibration"),
        pytest.param(fd, "compare", "SIGINT", ("results.json",), id="comparison"),
    ],
)
def test_a_stop_outside_of_training_is_one_sentence(
    done, tmp_path, monkeypatch, owner, function, kind, forgotten
):
    """From the set-up to the comparison; what was there before stays."""
    out = copied(done, tmp_path / "out")
    for pattern in forgotten:
        for path in out.glob(pattern):
            path.unlink()
    before = content(out)
    number = getattr(signal, kind)

    def stopping(*args, **options):
        os.kill(os.getpid(), number)
        pytest.fail("it continued")

    monkeypatch.setattr(owner, function, stopping)
    says(STOPPED, "--out", out)
    assert content(out) == before


# ------------------------------------------------------------------------------------ other threads


def test_a_run_in_a_thread_leaves_signals_alone(done, tmp_path):
    """Python sets handlers in the main thread alone, where they stay as they are."""
    out = tmp_path / "out"
    kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(kind) for kind in kinds]
    during = []
    failures = []

    def note():
        during.append([signal.getsignal(kind) for kind in kinds])

    def work():
        try:
            with before_network_calls(note):
                run(out)
        except BaseException as error:  # which the thread would keep to itself
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert failures == []
    assert during
    assert all(handlers == before for handlers in during)
    assert same_run(out, done)


# ---------------------------------------------------------------------------------- what is ignored


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with fd.interruptible() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert asked == []
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked == [True]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_stop_during_the_imports_is_one_sentence_unless_it_is_ignored(tmp_path, ignored):
    """A shell's & lets a command ignore SIGINT; then the run begins, here without a model."""
    out = tmp_path / "out"
    command = [sys.executable, fd.__file__, "--model", "no/such/folder", "--out", str(out)]
    handler = signal.SIG_IGN if ignored else signal.default_int_handler
    before = signal.signal(signal.SIGINT, handler)  # what a child ignores it has from its parent
    try:
        child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    limit = time.monotonic() + 60
    while not out.exists() and time.monotonic() < limit:  # made once the flags are parsed
        time.sleep(0.01)
    time.sleep(0.3)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 1
    assert "Traceback" not in said
    assert ("stopped before the run started" in said) != ignored
    assert ("is neither a local folder" in said) == ignored
