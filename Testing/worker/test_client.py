"""The client of a worker, with a real process that answers in the protocol as the test wants."""

import os
import signal
import sys
import time

import pytest

from GradProjIOLib.errors import InputError
from GradProjIOLib.worker.client import WorkerClient, python_executable

# Answers like the worker, but computes nothing.
WORKER = """
import json, os, sys
def send(**event): print(json.dumps(event), flush=True)
send(event="ready", pid=os.getpid())
print("a library prints something")
for line in sys.stdin:
    request = json.loads(line)
    kind, number = request["request"], request.get("id")
    if kind == "echo": send(event="started", id=number); send(event="done", id=number, text=request["text"])
    if kind == "hang": send(event="started", id=number)
    if kind == "crash":
        send(event="started", id=number)
        print("MemoryError: too big", file=sys.stderr); os._exit(1)
    if kind == "cancel": send(event="canceled", id=number)
"""


@pytest.fixture
def client():
    client = WorkerClient([sys.executable, "-c", WORKER])
    yield client
    client.close()


def wait_for(client, kind, seconds=60.0):
    """All events up to the first of `kind`."""
    events, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        events += client.poll()
        if any(event["event"] == kind for event in events):
            return events
        time.sleep(0.005)
    raise AssertionError(f"no {kind} in {seconds} s, only {events}")


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_request_comes_back_with_its_number(client):
    first, second = client.submit({"request": "echo", "text": "ä"}), client.submit({"request": "hang"})
    assert client._pending
    done = next(event for event in wait_for(client, "done") if event["event"] == "done")
    assert (done["id"], done["text"]) == (first, "ä")
    assert second != first
    assert client._pending


def test_polling_never_waits(client):
    client.submit({"request": "hang"})
    wait_for(client, "started")
    # The process is silent from here on, so a poll that waits for it would never return.
    assert client.poll() == []
    assert client.running


def test_a_killed_worker_is_reported_and_the_next_request_works(client):
    number = client.submit({"request": "hang"})
    wait_for(client, "started")
    os.kill(client.pid, signal.SIGKILL)
    died = wait_for(client, "died")[-1]
    assert died["id"] == number
    assert not client._pending
    client.submit({"request": "echo", "text": "again"})
    assert wait_for(client, "done")[-1]["text"] == "again"


def test_the_last_error_line_of_a_crashed_worker_is_the_message(client):
    client.submit({"request": "crash"})
    died = wait_for(client, "died")[-1]
    assert died["message"] == "MemoryError: too big"
    assert died["code"] == 1


def test_a_process_that_always_ends_at_once_is_started_twice_and_then_reported(tmp_path):
    """Such a process ends with status 0 before it has read a request, like one that was not used for too long."""
    count = tmp_path / "starts"
    code = f"import sys; open({str(count)!r}, 'a').write('x'); print('no licence', file=sys.stderr)"
    client = WorkerClient([sys.executable, "-c", code])
    numbers = [client.submit({"request": "echo", "text": text}) for text in ("a", "b")]
    events = wait_for(client, "died")
    assert [event["id"] for event in events] == numbers
    assert {(event["code"], event["message"]) for event in events} == {(0, "no licence")}
    assert not client._pending
    assert not client.running
    # The second request may have found that the first process had ended.
    assert count.read_text() in ("xx", "xxx")


def test_a_process_that_cannot_be_started_again_is_reported(tmp_path):
    command = tmp_path / "worker"
    command.write_text(f"#!/bin/sh\nrm {command}\n")
    command.chmod(0o755)
    client = WorkerClient([str(command)])
    number = client.submit({"request": "echo", "text": "x"})
    (died,) = wait_for(client, "died")
    assert died["id"] == number
    assert "could not be started" in died["message"]
    assert not client._pending


def test_a_worker_that_went_idle_as_the_request_came_is_started_again(client):
    idle = WorkerClient([sys.executable, "-c", f"import os, sys\nif os.environ.get('FIRST'): sys.exit(0)\n{WORKER}"])
    idle._environment["FIRST"] = "yes"
    idle.start()
    idle._environment.clear()
    idle.submit({"request": "echo", "text": "hello"})
    try:
        events = wait_for(idle, "done")
    finally:
        idle.close()
    assert events[-1]["text"] == "hello"
    assert "died" not in {event["event"] for event in events}


def test_kill_leaves_no_process(client):
    client.submit({"request": "hang"})
    wait_for(client, "started")
    pid = client.pid
    client.kill()
    assert not is_alive(pid)
    assert client.poll() == []
    assert not client.running


def test_kill_reaches_the_worker_behind_a_launcher():
    """PythonSlicer starts Python as a child of its own."""
    launcher = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {WORKER!r}]))"
    client = WorkerClient([sys.executable, "-c", launcher])
    client.submit({"request": "hang"})
    wait_for(client, "started")
    pid = client.pid
    client.kill()
    end = time.monotonic() + 60
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert not is_alive(pid)


def test_close_ends_an_idle_worker_in_good_order(client):
    client.submit({"request": "echo", "text": "x"})
    wait_for(client, "done")
    process, pid = client._process, client.pid
    client.close()
    assert process.returncode == 0
    assert not is_alive(pid)


def test_a_command_that_does_not_exist_gives_a_sentence_and_leaves_nothing_pending():
    client = WorkerClient(["/no/such/python"])
    with pytest.raises(InputError, match="no/such"):
        client.submit({"request": "echo", "text": "x"})
    assert not client._pending
    client.close()


def test_outside_slicer_the_same_python_is_used():
    assert python_executable() == sys.executable


def test_inside_slicer_python_slicer_is_used(monkeypatch, tmp_path):
    launcher = tmp_path / "PythonSlicer"
    launcher.write_text("#!/bin/sh\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", "/opt/Slicer/bin/SlicerApp-real")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert python_executable() == str(launcher)
