"""Weights files: downloads over TLS from a server on the loopback device, and the checks of what arrived."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import checksum
from GradProjIOLib.models import registry, weights

CONTENT = random.Random(0).randbytes(1_000_003)
HALF = len(CONTENT) // 2


class Remote(ThreadingHTTPServer):
    """A server of one file, with the faults that a test asks for."""

    daemon_threads = True

    def __init__(self, certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.length: int | None = None  # announced in place of the true one
        self.tells_length = True
        self.stops_after: int | None = None  # bytes, then the connection ends …
        self.resumes = threading.Event()  # … or, with `waits`, goes on once this is set
        self.waits = False
        self.redirect: str | None = None
        self.status: int | None = None
        self.requests = 0
        scheme = "http"
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate, certificate.with_suffix(".key"))
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
            scheme = "https"
        self.origin = f"{scheme}://127.0.0.1:{self.server_port}"
        self.url = f"{self.origin}/release/final.trch"

    def handle_error(self, request, client_address):
        pass  # clients that leave early are part of these tests


class Handler(BaseHTTPRequestHandler):
    server: Remote

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        remote = self.server
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", remote.redirect)
            self.end_headers()
            return
        remote.requests += 1
        if remote.status:
            self.send_error(remote.status)
            return
        self.send_response(200)
        if remote.tells_length:
            self.send_header("Content-Length", str(remote.length or len(remote.content)))
        self.end_headers()
        first = remote.content[: remote.stops_after]
        self.wfile.write(first)
        if remote.waits and remote.resumes.wait(30):
            self.wfile.write(remote.content[len(first) :])


@pytest.fixture(scope="session")
def certificate(tmp_path_factory) -> Path:
    """A certificate for 127.0.0.1 that only contexts made with it trust."""
    if not shutil.which("openssl"):
        pytest.skip("needs the openssl program to make a certificate")
    path = tmp_path_factory.mktemp("certificate") / "server.pem"
    options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=127.0.0.1"
    extensions = "-addext subjectAltName=IP:127.0.0.1 -addext keyUsage=critical,digitalSignature,keyCertSign"
    outputs = ["-keyout", path.with_suffix(".key"), "-out", path]
    command = ["openssl", *options.split(), *extensions.split(), *outputs]
    subprocess.run(command, check=True, capture_output=True)
    return path


def serving(remote: Remote):
    thread = threading.Thread(target=remote.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield remote
    remote.resumes.set()
    remote.shutdown()
    remote.server_close()
    thread.join()


@pytest.fixture
def remote(certificate):
    yield from serving(Remote(certificate))


@pytest.fixture
def plain_remote():
    yield from serving(Remote())


@pytest.fixture
def trusting(certificate, monkeypatch) -> None:
    """Trust the server, in this process and in those that it starts."""
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRADPROJIO_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


def assert_one_sentence(error) -> None:
    """The message names address and place once, without the layers that libraries put around a failure."""
    message = str(error.value)
    assert "\n" not in message
    assert "HTTPSConnectionPool" not in message
    assert message.count("https://") == 1


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_cache_directory(cache, monkeypatch):
    assert weights.cache_directory() == cache
    monkeypatch.delenv("GRADPROJIO_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert weights.cache_directory().name == "GradProjIO"
    if sys.platform == "linux":
        assert weights.cache_directory() == Path("/somewhere/GradProjIO")


def test_models_with_equal_file_names_have_their_own_place(cache):
    paths = {weights.cached_path(name, "https://host/x/Step_2_final.trch?a=b") for name in ("one", "two")}
    assert paths == {cache / "one-Step_2_final.trch", cache / "two-Step_2_final.trch"}


def test_missing_weights_are_said_with_address_place_and_other_models(cache):
    with pytest.raises(InputError) as caught:
        registry.weights_path("unigradicon")
    for part in (
        registry.MODELS["unigradicon"].url,
        f"{cache}/unigradicon-",
        "(compact)",
        "gradprojio models download unigradicon",
    ):
        assert part in str(caught.value)


def test_download_lands_in_the_cache_and_reports_progress(remote, trusting, cache):
    seen = []
    path = weights.download("net", remote.url, on_progress=lambda *step: seen.append(step))
    assert path == cache / "net-final.trch"
    assert path.read_bytes() == CONTENT
    assert names(cache) <= {"net-final.trch", "net-final.trch.lock"}
    received = [step[0] for step in seen]
    assert received[0] == weights.CHUNK
    assert received[-1] == len(CONTENT)
    assert received == sorted(received)
    assert {step[1] for step in seen} == {len(CONTENT)}


def test_download_follows_redirects_within_https(remote, trusting):
    remote.redirect = remote.url
    path = weights.download("net", f"{remote.origin}/moved")
    assert path.read_bytes() == CONTENT


def test_download_of_plain_http_is_refused(plain_remote, cache):
    with pytest.raises(InputError, match="HTTPS"):
        weights.download("net", plain_remote.url)
    assert plain_remote.requests == 0
    assert not cache.exists()


def test_redirect_to_plain_http_is_refused(remote, plain_remote, trusting, cache):
    remote.redirect = plain_remote.url
    with pytest.raises(InputError, match="not HTTPS"):
        weights.download("net", f"{remote.origin}/moved")
    assert plain_remote.requests == 0
    assert names(cache) <= {"net-moved.lock"}


def test_server_without_a_trusted_certificate_is_refused(remote):
    with pytest.raises(InputError, match=r"(?i)certificate") as error:
        weights.download("net", remote.url)
    assert_one_sentence(error)
    assert remote.requests == 0


def test_cut_download_leaves_nothing(remote, trusting, cache):
    remote.stops_after = HALF
    with pytest.raises(InputError, match=rf"\(Connection broken: IncompleteRead\({HALF} bytes read") as error:
        weights.download("net", remote.url)
    assert_one_sentence(error)
    assert names(cache) <= {"net-final.trch.lock"}
    remote.stops_after = None
    assert weights.download("net", remote.url).read_bytes() == CONTENT


def test_canceled_download_leaves_the_old_file_alone(remote, trusting, cache):
    cache.mkdir()
    path = weights.cached_path("net", remote.url)
    path.write_bytes(b"old")
    with pytest.raises(weights.DownloadCancelled):
        weights.download("net", remote.url, on_progress=lambda got, _: got < HALF)
    assert path.read_bytes() == b"old"
    assert names(cache) <= {path.name, f"{path.name}.lock"}


def test_unknown_length(remote, trusting):
    remote.tells_length = False
    seen = []
    path = weights.download("net", remote.url, on_progress=lambda *step: seen.append(step))
    assert path.read_bytes() == CONTENT
    assert seen[-1][0] >= len(CONTENT)
    assert {total for _, total in seen} == {None}


def test_silent_server_times_out(remote, trusting, cache, monkeypatch):
    monkeypatch.setattr(weights, "TIMEOUT", 0.3)
    remote.stops_after, remote.waits = HALF, True
    with pytest.raises(InputError, match="timed out") as error:
        weights.download("net", remote.url)
    assert_one_sentence(error)
    assert not (cache / "net-final.trch").exists()


def test_refusals_name_the_address_and_the_place(remote, trusting, cache):
    remote.status = 404
    with pytest.raises(InputError, match="404") as error:
        weights.download("net", remote.url)
    assert remote.url in str(error.value)
    assert str(cache / "net-final.trch") in str(error.value)
    assert_one_sentence(error)


def test_no_connection():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="refused") as error:
            weights.download("net", f"https://127.0.0.1:{silent.getsockname()[1]}/net.trch")
    assert_one_sentence(error)


def test_folder_that_cannot_be_made(remote, trusting, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRADPROJIO_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="file"):
        weights.download("net", remote.url)


DOWNLOADER = """
import resource, sys
from GradProjIOLib.models.weights import download
from GradProjIOLib.errors import InputError
url, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download("net", url, on_progress=lambda received, total: print(received, flush=True))
except InputError as error:
    sys.exit(str(error))
"""


def start_download(remote, limit=0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOADER, remote.url, str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_written(process: subprocess.Popen):
    if not process.stdout.readline():
        pytest.fail(process.stderr.read())


def test_second_process_is_refused_and_the_first_one_finishes(remote, trusting, cache):
    remote.stops_after, remote.waits = HALF, True
    first = start_download(remote)
    wait_until_written(first)
    second = start_download(remote)
    assert "Another process" in second.communicate(timeout=20)[1]
    assert second.returncode == 1
    remote.resumes.set()
    assert first.communicate(timeout=20)[1] == ""
    assert (cache / "net-final.trch").read_bytes() == CONTENT


def test_killed_process_leaves_no_lock_and_its_half_is_removed(remote, trusting, cache):
    remote.stops_after, remote.waits = HALF, True
    process = start_download(remote)
    wait_until_written(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert any(name.startswith(".writing-") for name in names(cache))
    remote.stops_after, remote.waits = None, False
    assert weights.download("net", remote.url).read_bytes() == CONTENT
    assert names(cache) <= {"net-final.trch", "net-final.trch.lock"}


def test_full_disk_while_writing(remote, trusting, cache):
    process = start_download(remote, limit=HALF)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert "File too large" in error
    assert error.count("\n") == 1
    assert not (cache / "net-final.trch").exists()


# What a file may hold

SHAPES = {"conv.weight": (4, 3, 2), "conv.bias": (4,), "norm.num_batches_tracked": ()}


def state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    floats = {key: torch.randn(shape, generator=generator) for key, shape in list(SHAPES.items())[:2]}
    return {key: value.to(dtype) for key, value in floats.items()} | {"norm.num_batches_tracked": torch.tensor(7)}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.trch"


def refusal(path: Path) -> str:
    """The one sentence with which `path` is refused."""
    with pytest.raises(InputError) as error:
        weights.load_state(path, SHAPES)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    assert "download it" in message
    return message


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_floating_type_becomes_float32(path, dtype):
    torch.save(state(dtype), path)
    loaded = weights.load_state(path, SHAPES)
    assert list(loaded) == list(SHAPES)
    for key, value in state(dtype).items():
        expected = value.float() if value.is_floating_point() else value
        torch.testing.assert_close(loaded[key], expected, rtol=0, atol=0)


def test_parameters_become_plain_tensors(path):
    torch.save({key: torch.nn.Parameter(value, value.is_floating_point()) for key, value in state().items()}, path)
    assert not any(value.requires_grad for value in weights.load_state(path, SHAPES).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv.bias": None}, "of 3 entries 1 missing (conv.bias)"),
        ({"extra.bias": torch.zeros(1)}, "of 3 entries 1 unexpected (extra.bias)"),
        (
            {"conv.bias": None, **{f"b{i}": torch.zeros(1) for i in range(5)}},
            "1 missing (conv.bias) and 5 unexpected (b0, b1, b2, …)",
        ),
        ({3: torch.zeros(1)}, "1 unexpected (3)"),
        ({"conv.weight": torch.zeros(4, 3, 3)}, "shape [4, 3, 3] instead of [4, 3, 2] for conv.weight"),
        ({"conv.bias": torch.tensor([0, 0, torch.nan, 0])}, "not finite under conv.bias"),
        ({"conv.bias": torch.tensor([0, -torch.inf, 0, 0])}, "not finite under conv.bias"),
        ({"conv.bias": torch.full((4,), 1e300, dtype=torch.float64)}, "not finite under conv.bias"),
        ({"conv.bias": torch.zeros(4, dtype=torch.int64)}, "int64"),
        ({"conv.bias": torch.zeros(4, dtype=torch.complex64)}, "complex64"),
        ({"conv.bias": [0.0] * 4}, "no plain tensor under conv.bias"),
        ({"conv.bias": torch.zeros(4).to_sparse()}, "no plain tensor under conv.bias"),
        ({"conv.bias": torch.zeros(4, device="meta")}, "no plain tensor under conv.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(path, change, message):
    changed = {key: value for key, value in (state() | change).items() if value is not None}
    torch.save(changed, path)
    assert message in refusal(path)


def test_files_that_are_no_checkpoint_are_refused(path):
    assert "No such file" in refusal(path)
    path.mkdir()
    assert "directory" in refusal(path)
    path.rmdir()
    for content in (b"", b"<html>not found</html>", pickle.dumps(state())):
        path.write_bytes(content)
        assert "not a PyTorch file" in refusal(path)
    torch.save(list(state().values()), path)
    assert "holds a list" in refusal(path)
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    assert "not a PyTorch file" in refusal(path)
    shutil.make_archive(str(path.with_suffix("")), "zip", path.parent, path.name)
    path.with_suffix(".zip").rename(path)
    assert "damaged" in refusal(path)


def test_damaged_files_are_refused_or_hold_the_right_values(path):
    torch.save(state(), path)
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = weights.load_state(path, SHAPES)
        except InputError:
            refused += 1
        else:  # the damage hit padding or a field without meaning
            assert all(torch.equal(loaded[key], value) for key, value in state().items())
    assert refused > 20
    for size in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:size])
        refusal(path)


class Bomb:
    """Pickled, it is a call that creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("kind", ["plain pickle", "old format", "old format, zip behind", "zip", "zip, one entry"])
def test_code_in_a_file_is_refused_and_not_run(path, tmp_path, kind):
    target = tmp_path / "the code ran"
    if kind == "plain pickle":
        path.write_bytes(pickle.dumps(Bomb(target)))
    elif kind == "zip, one entry":
        torch.save(state() | {"conv.bias": Bomb(target)}, path)
    else:
        torch.save(Bomb(target), path, _use_new_zipfile_serialization=kind == "zip")
    if kind == "old format, zip behind":
        torch.save(state(), path.with_suffix(".zip"))
        with open(path, "ab") as file:
            file.write(path.with_suffix(".zip").read_bytes())
    message = refusal(path)
    assert ("Python objects" if kind.startswith("zip") else "not a PyTorch file") in message
    assert not target.exists()
    if kind == "plain pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert target.exists(), "the file is harmless, so the test above showed nothing"


def test_published_keys_and_shapes(path):
    unigradicon = pytest.importorskip("unigradicon")
    with torch.device("meta"):
        network = unigradicon.make_network([1, 1, 24, 24, 24], include_last_step=True).regis_net
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert len(expected) == 188
    values = {}
    for number, (key, value) in enumerate(network.state_dict().items()):  # one number per entry: a small file
        values[key] = torch.tensor(number, dtype=value.dtype).expand(value.shape)
    torch.save(values, path)
    network.to_empty(device="cpu")
    network.load_state_dict(weights.load_state(path, expected))
    assert [value.flatten()[-1].item() for value in network.state_dict().values()] == list(range(188))


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_loading_needs_one_copy(path):
    """The peak grows by the size of the weights and some constant, not by twice their size."""
    shapes = {f"w{number}": (4, 1 << 18) for number in range(24)}
    torch.save({key: torch.zeros(shape) for key, shape in shapes.items()}, path)
    size = path.stat().st_size
    code = """if True:
        import json, sys
        import torch
        from GradProjIOLib.models.weights import load_state
        def peak():
            return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        state = load_state(sys.argv[1], {key: tuple(shape) for key, shape in json.loads(sys.argv[2]).items()})
        print(peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", code, path, json.dumps(shapes)], capture_output=True, text=True, check=True
    )
    path.unlink()
    assert size < int(done.stdout) * 1024 < 1.4 * size


# Files in the cache


def test_checksum_of_the_first_good_file_is_kept(path):
    torch.save(state(), path)
    loaded, digest = weights.load_cached(path, SHAPES)
    assert digest == weights.checksum(path)
    assert path.with_name("net.trch.sha256").read_text() == f"{digest}  net.trch\n"
    assert names(path.parent) == {"net.trch", "net.trch.sha256"}
    again, same = weights.load_cached(path, SHAPES)
    torch.testing.assert_close(again, loaded)
    assert same == digest


def test_cached_file_that_changed_is_refused(path):
    torch.save(state(), path)
    weights.load_cached(path, SHAPES)
    torch.save({key: value + 1 for key, value in state().items()}, path)
    with pytest.raises(InputError, match="has changed since") as error:
        weights.load_cached(path, SHAPES)
    assert str(path) in str(error.value)
    assert "delete both files" in str(error.value)
    assert weights.load_state(path, SHAPES), "a file that the user names is not bound to a checksum"


def test_published_weights_are_hashed_once_when_they_are_loaded(cache, monkeypatch):
    """They have 283 MB."""
    cache.mkdir()
    model = replace(registry.MODELS["compact"], bundled=None, url="https://host/small.pt")
    monkeypatch.setitem(registry.MODELS, "small", model)
    torch.save(registry.state_for_file(registry.build(model), model), weights.cached_path("small", model.url))
    hashed = []
    monkeypatch.setattr(weights, "checksum", lambda path: hashed.append(path) or checksum(path))
    for _ in range(2):
        registry._read_once.cache_clear()
        assert registry.load("small").sha256 == checksum(weights.cached_path("small", model.url))
    assert len(hashed) == 2
    registry._read_once.cache_clear()


def test_bad_first_file_leaves_no_checksum(path):
    torch.save(state() | {"conv.bias": torch.zeros(5)}, path)
    with pytest.raises(InputError):
        weights.load_cached(path, SHAPES)
    assert names(path.parent) == {"net.trch"}


def test_new_download_replaces_file_and_checksum(remote, trusting, cache):
    cache.mkdir()
    path = weights.cached_path("net", remote.url)
    torch.save(state(), path)
    weights.load_cached(path, SHAPES)
    torch.save({key: value + 1 for key, value in state().items()}, path.with_suffix(".new"))
    remote.content = path.with_suffix(".new").read_bytes()
    weights.download("net", remote.url)
    assert torch.equal(weights.load_cached(path, SHAPES)[0]["conv.bias"], state()["conv.bias"] + 1)
