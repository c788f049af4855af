"""``edgekit run`` as a user has it: a real process, signals, a terminal's lines, a hard limit."""

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from control_groups import HOG, real_group
from tiny_artifact import LARGER, make_artifact

MIB = 1 << 20
EDGEKIT = [sys.executable, "-m", "edgekit"]
ENDLESS = ["-n", "90000", "--ignore-eos", "--context", "100000"]


@pytest.fixture(scope="module")
def artifact(layered_artifact: Path) -> str:
    return str(layered_artifact)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_artifact(tmp_path_factory.mktemp("larger"), LARGER))


def smallest(artifact: str, context: int) -> int:
    """The budget in MiB that a refusal names."""
    words = [*EDGEKIT, "plan", artifact, "--budget", "1", "--context", str(context)]
    done = subprocess.run(words, capture_output=True, text=True)
    match = re.search(r"give --budget (\d+)MiB", done.stderr)
    assert done.returncode == 3 and match, done
    return int(match[1])


@contextmanager
def running(*words: str) -> Iterator["subprocess.Popen[str]"]:
    """A run that has loaded and is generating."""
    command = [*EDGEKIT, "run", *words]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_until_loaded(process)
        try:
            yield process
        finally:
            process.kill()


def wait_until_loaded(process: "subprocess.Popen[str]") -> None:
    assert process.stderr is not None
    while "planned" not in (line := process.stderr.readline()):
        assert line, "it ended before it had loaded"


def child_of(process: "subprocess.Popen[str]") -> psutil.Process:
    (child,) = psutil.Process(process.pid).children()
    return child


def test_inside_a_group_of_exactly_the_budget_it_is_not_killed(artifact: str) -> None:
    least = smallest(artifact, 512)
    for budget in (least, least + 3, least + 40):
        with real_group(budget * MIB) as group:
            words = ["run", artifact, "--budget", f"{budget}MiB", "--context", "512"]
            words += ["-p", "a b c d " * 55, "-n", "32", "--ignore-eos", "--json"]  # most of it
            process = group.start([*EDGEKIT, *words])
            out, err = process.communicate()
            assert process.returncode == 0, err
        body = json.loads(out)
        assert body["n_gen"] == 32 and body["plan"]["total_bytes"] <= budget * MIB
        predicted = body["plan"]["total_bytes"]
        assert abs(predicted - body["peak_rss_bytes"]) <= max(0.05 * predicted, 16 * MIB)


def test_one_step_below_the_smallest_budget_ends_with_3_and_the_budget_that_fits(
    artifact: str,
) -> None:
    least = smallest(artifact, 512)
    words = ["run", artifact, "--budget", f"{least - 1}MiB", "--context", "512", "-p", "def"]
    done = subprocess.run([*EDGEKIT, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (3, "", 1)
    assert f"give --budget {least}MiB" in done.stderr


def test_a_kill_by_the_memory_manager_is_told_in_words(artifact: str) -> None:
    """A budget that the group does not have."""
    with real_group(40 * MIB) as group:
        words = ["run", artifact, "--budget", "1GiB", "--no-follow", "-p", "a", "-n", "8"]
        process = group.start([*EDGEKIT, *words])
        _, err = process.communicate()
    assert process.returncode == 3
    assert "killed by the memory manager: it " in err.splitlines()[-1]
    assert "Traceback" not in err


def test_an_abort_of_llama_cpp_is_told_in_words(artifact: str) -> None:
    with running(artifact, "--budget", "1GiB", "-p", "a", *ENDLESS) as process:
        child_of(process).send_signal(signal.SIGABRT)
        _, err = process.communicate()
        assert process.returncode == 1
        assert "llama.cpp ended the process with SIGABRT" in err


def test_a_killed_parent_leaves_no_child(artifact: str) -> None:
    with running(artifact, "--budget", "1GiB", "-p", "a", *ENDLESS) as process:
        child = child_of(process)
        process.kill()
        child.wait(timeout=20)


def test_a_termination_reaches_the_child(artifact: str) -> None:
    with running(artifact, "--budget", "1GiB", "-p", "a", *ENDLESS) as process:
        process.terminate()
        _, err = process.communicate(timeout=20)
        assert process.returncode == 1 and err.splitlines()[-1] == "Error: stopped"


def test_a_signal_for_another_budget_while_it_loads_ends_nothing(artifact: str) -> None:
    command = [*EDGEKIT, "run", artifact, "--budget", "1GiB", "-p", "a", "-n", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not psutil.Process(process.pid).children():
            assert process.poll() is None
        for _ in range(20):  # imports alone take longer
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.005)
        process.communicate()
    assert process.returncode == 0


def test_a_prompt_that_is_no_text_is_refused_before_anything_is_loaded(artifact: str) -> None:
    done = subprocess.run(
        [*EDGEKIT, "run", artifact, "-p", "-"], input=b"caf\xe9", capture_output=True
    )
    assert done.returncode == 5
    assert done.stderr == b"Error: the prompt on stdin is not UTF-8 (byte 3); convert it first\n"


def test_signals_halve_the_budget_and_bring_it_back(artifact: str) -> None:
    budget = 2 * smallest(artifact, 2048)
    words = ["-p", "a", "-n", "700", "--ignore-eos", "--context", "2048", "--json"]
    with running(artifact, "--budget", f"{budget}MiB", *words) as process:
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        process.send_signal(signal.SIGUSR2)
        out, err = process.communicate()
    assert process.returncode == 0, err
    body = json.loads(out)
    assert body["n_gen"] == 700
    before, after = (row["after_bytes"] for row in body["changes"])
    assert before <= budget * MIB / 2 < after == body["plan"]["total_bytes"]


def test_a_conversation_takes_commands_and_goes_on(artifact: str) -> None:
    least = smallest(artifact, 512)
    lines = ["def add", "/budget 1", f"/budget {least}MiB", "/plan", "/nonsense", "class", "/quit"]
    words = ["run", artifact, "--budget", "1GiB", "--context", "512", "-n", "8", "--ignore-eos"]
    text = "\n".join(lines) + "\n"
    done = subprocess.run([*EDGEKIT, *words], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notes = done.stderr
    assert "Error: the lowest depth needs" in notes  # the conversation goes on
    assert "unknown command /nonsense" in notes
    assert notes.count("bits per weight") == 3  # loaded, /budget, /plan
    assert len(done.stdout.strip()) > 8


def test_lines_that_come_together_are_answered_while_the_pipe_stays_open(artifact: str) -> None:
    command = [*EDGEKIT, "run", artifact, "--budget", "1GiB", "--context", "512", "-n", "4"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write("/plan\n/nonsense\n/quit\n")
        process.stdin.flush()
        assert process.wait(timeout=60) == 0
        assert process.stderr is not None
        assert "unknown command /nonsense" in process.stderr.read()


def test_a_signal_that_asks_for_too_little_leaves_the_run_as_it_is(artifact: str) -> None:
    words = ["-p", "a", "-n", "500", "--ignore-eos", "--context", "1024", "--json"]
    with running(artifact, "--budget", f"{smallest(artifact, 1024) + 4}MiB", *words) as process:
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate()
    assert process.returncode == 0, err
    body = json.loads(out)
    assert body["n_gen"] == 500
    assert "asked" not in [change["reason"] for change in body["changes"]]
    assert "the old depth stays: the lowest depth needs" in err


def test_a_conversation_ends_with_its_input(artifact: str) -> None:
    words = ["run", artifact, "--budget", "1GiB", "--context", "512", "-n", "4"]
    done = subprocess.run([*EDGEKIT, *words], input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_stop_texts_end_an_answer(artifact: str) -> None:
    words = ["run", artifact, "--budget", "1GiB", "--context", "512", "-n", "200", "--ignore-eos"]
    words += ["-p", "def", "--seed", "4", "--json"]
    done = subprocess.run([*EDGEKIT, *words], capture_output=True, text=True, check=True)
    whole = json.loads(done.stdout)["text"]
    stop = whole[30:33]
    done = subprocess.run([*EDGEKIT, *words, "--stop", stop], capture_output=True, text=True)
    body = json.loads(done.stdout)
    assert body["text"] == whole[: whole.index(stop)] and body["stopped"] == "stop"


def test_a_plan_needs_no_weights_on_disk(artifact: str, tmp_path: Path) -> None:
    manifest = Path(artifact, "edgekit.json")
    (tmp_path / "edgekit.json").write_bytes(manifest.read_bytes())
    answers = []
    for folder in (artifact, str(tmp_path)):
        words = [*EDGEKIT, "plan", folder, "--budget", "100MiB", "--json"]
        answers.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    assert answers[0] == answers[1]


def test_a_limit_that_falls_and_rises_kills_nothing_and_loses_no_token(larger: str) -> None:
    """A group lowered in steps to the smallest budget and raised again, in mid-generation."""
    least, steps = smallest(larger, 1536), 6
    top = least + 110
    budget = (least + 80) * MIB
    sizes = [top - (top - least) * i // steps for i in range(steps + 1)]
    with real_group(top * MIB) as group:
        words = ["run", larger, "--context", "1536", "-p", "def", "-n", "1400", "--json"]
        process = group.start([*EDGEKIT, *words, "--ignore-eos", "--budget", str(budget)])
        wait_until_loaded(process)
        for size in [*sizes, *reversed(sizes)]:
            _lower(group, size * MIB)
            time.sleep(0.2)
        out, err = process.communicate()
        assert process.returncode == 0, err
    body = json.loads(out)
    assert body["n_gen"] == 1400
    assert 2 <= len(body["changes"]) <= 2 * 2 * steps
    assert min(change["after_bytes"] for change in body["changes"]) < least * MIB + 20 * MIB
    assert body["plan"]["budget_bytes"] == budget  # back where it began


def _lower(group: object, n_bytes: int) -> None:
    """Set the limit; where more is in use (EBUSY), again until the process has given way."""
    for _ in range(100):
        try:
            group.limit(n_bytes)  # type: ignore[attr-defined]
            return
        except OSError:
            time.sleep(0.05)
    raise AssertionError(f"the process did not give way to a limit of {n_bytes} bytes")


def test_a_neighbour_that_eats_memory_takes_depth_and_gives_it_back(larger: str) -> None:
    """Nobody changes the limit: a second process in the same group takes what was free."""
    size = smallest(larger, 1536) + 110
    budget = (size - 30) * MIB
    with real_group(size * MIB) as group:
        words = ["run", larger, "--context", "1536", "-p", "def", "-n", "1400", "--json"]
        process = group.start([*EDGEKIT, *words, "--ignore-eos", "--budget", str(budget)])
        wait_until_loaded(process)
        hog = group.start([sys.executable, "-c", HOG, str(80 * MIB)])
        out, err = process.communicate()
        hog.communicate()
        assert (process.returncode, hog.returncode) == (0, 0), err
    body = json.loads(out)
    assert body["n_gen"] == 1400
    assert 2 <= len(body["changes"]) <= 10
    assert body["plan"]["budget_bytes"] == budget


def test_a_text_in_two_runs_with_a_state_is_the_text_of_one(artifact: str, tmp_path: Path) -> None:
    words = [*EDGEKIT, "run", artifact, "--budget", "1GiB", "--context", "256", "--no-follow"]
    words += ["--threads", "1", "--temperature", "0", "--ignore-eos", "--raw", "--json"]

    def text(prompt: str, n: int, *more: str) -> str:
        done = subprocess.run(
            [*words, "-p", prompt, "-n", str(n), *more], capture_output=True, text=True, check=True
        )
        return str(json.loads(done.stdout)["text"])

    state = ("--state", str(tmp_path / "state"))
    assert text("a b c", 12, *state) + text("", 12, *state) == text("a b c", 24)
