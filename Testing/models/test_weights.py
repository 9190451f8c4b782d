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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from GradProjIOLib.errors import InputError
from GradProjIOLib.models import weights

CONTENT = random.Random(0).randbytes(1_000_003)
HALF = len(CONTENT) // 2


class Remote(ThreadingHTTPServer):
    """A server of one file, with the faults that a test asks for."""

    daemon_threads = True

    def __init__(self, certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"first"'
        self.obeys = {"Range", "If-Range"}
        self.length: int | None = None  # announced in place of the true one
        self.tells_length = True
        self.stops_after: int | None = None  # bytes, then the connection ends …
        self.resumes = threading.Event()  # … or, with `waits`, goes on once this is set
        self.waits = False
        self.redirect: str | None = None
        self.status: int | None = None
        self.ranges: list[str | None] = []  # the Range header of every request
        self.sent = 0
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
        remote.ranges.append(self.headers["Range"])
        start = self.requested_start()
        if remote.status or start > len(remote.content) - 1:
            self.send_error(remote.status or 416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(remote.content) - 1}/{len(remote.content)}")
        if remote.etag:
            self.send_header("ETag", remote.etag)
        if remote.tells_length:
            self.send_header("Content-Length", str(remote.length or len(remote.content) - start))
        self.end_headers()
        self.send_body(remote.content[start:])

    def requested_start(self) -> int:
        obeys = self.server.obeys
        if "Range" not in obeys or not self.headers["Range"]:
            return 0
        if "If-Range" in obeys and self.headers["If-Range"] != self.server.etag:
            return 0
        return int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))

    def send_body(self, body: bytes):
        remote = self.server
        first = body[: remote.stops_after]
        self.wfile.write(first)
        remote.sent += len(first)
        if remote.waits and remote.resumes.wait(30):
            self.wfile.write(body[len(first) :])


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
def trusting(certificate) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRADPROJIO_CACHE", str(folder))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return folder


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


def test_missing_message_names_address_place_and_other_models():
    message = weights.missing_message("big", "https://host/big.trch", "/cache/big.trch", ["compact", "huge"])
    for part in (
        "https://host/big.trch",
        "/cache/big.trch",
        "compact, huge",
        "gradprojio models download big",
    ):
        assert part in message


def test_download_lands_in_the_cache_and_reports_progress(remote, trusting, cache):
    seen = []
    path = weights.download("net", remote.url, on_progress=lambda *step: seen.append(step), context=trusting)
    assert path == cache / "net-final.trch"
    assert path.read_bytes() == CONTENT
    assert names(cache) == {"net-final.trch", "net-final.trch.lock"}
    received = [step[0] for step in seen]
    assert received[0] == 0
    assert received[-1] == len(CONTENT)
    assert received == sorted(received)
    assert {step[1] for step in seen} == {len(CONTENT)}


def test_download_follows_redirects_within_https(remote, trusting, tmp_path):
    remote.redirect = remote.url
    path = weights.download("net", f"{remote.origin}/moved", tmp_path / "here.trch", context=trusting)
    assert path.read_bytes() == CONTENT


def test_download_of_plain_http_is_refused(plain_remote, cache):
    with pytest.raises(InputError, match="HTTPS"):
        weights.download("net", plain_remote.url)
    assert plain_remote.ranges == []
    assert not cache.exists()


def test_redirect_to_plain_http_is_refused(remote, plain_remote, trusting, cache):
    remote.redirect = plain_remote.url
    with pytest.raises(InputError, match="not HTTPS"):
        weights.download("net", f"{remote.origin}/moved", context=trusting)
    assert plain_remote.ranges == []
    assert names(cache) == {"net-moved.lock"}


def test_server_without_a_trusted_certificate_is_refused(remote):
    with pytest.raises(InputError, match=r"(?i)certificate"):
        weights.download("net", remote.url)
    assert remote.ranges == []


def test_cut_download_is_resumed(remote, trusting, cache):
    remote.stops_after = HALF
    with pytest.raises(InputError, match=f"after {HALF} of {len(CONTENT)} bytes"):
        weights.download("net", remote.url, context=trusting)
    assert not (cache / "net-final.trch").exists()
    remote.stops_after = None
    path = weights.download("net", remote.url, context=trusting)
    assert path.read_bytes() == CONTENT
    assert remote.ranges == [None, f"bytes={HALF}-"]
    assert remote.sent == len(CONTENT)
    assert names(cache) == {"net-final.trch", "net-final.trch.lock"}


def test_cancelled_download_is_resumed_and_leaves_the_old_file_alone(remote, trusting, tmp_path):
    path = tmp_path / "net.trch"
    path.write_bytes(b"old")
    with pytest.raises(weights.DownloadCancelled):
        weights.download("net", remote.url, path, on_progress=lambda got, _: got < HALF, context=trusting)
    assert path.read_bytes() == b"old"
    first = []
    weights.download("net", remote.url, path, on_progress=lambda got, _: first.append(got), context=trusting)
    assert path.read_bytes() == CONTENT
    assert HALF <= first[0] < len(CONTENT)


@pytest.mark.parametrize(
    "change",
    [
        {"content": CONTENT[::-1], "etag": '"second"'},
        {"content": CONTENT[::-1], "etag": '"second"', "obeys": {"Range"}},
        {"content": CONTENT[: HALF - 7], "etag": '"second"', "obeys": {"Range"}},
        {"content": CONTENT[:HALF]},  # nothing left to send: the server answers 416
        {"obeys": set()},
    ],
    ids=["changed", "changed, ignores If-Range", "now shorter", "part already whole", "ignores Range"],
)
def test_download_that_cannot_be_resumed_starts_over(remote, trusting, change):
    remote.stops_after = HALF
    with pytest.raises(InputError):
        weights.download("net", remote.url, context=trusting)
    remote.stops_after = None
    for key, value in change.items():
        setattr(remote, key, value)
    assert weights.download("net", remote.url, context=trusting).read_bytes() == remote.content
    assert remote.ranges[1] == f"bytes={HALF}-"


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_a_strong_etag_nothing_is_resumed(remote, trusting, etag):
    remote.etag, remote.stops_after = etag, HALF
    with pytest.raises(InputError):
        weights.download("net", remote.url, context=trusting)
    remote.stops_after = None
    assert weights.download("net", remote.url, context=trusting).read_bytes() == CONTENT
    assert remote.ranges == [None, None]


def test_part_of_another_address_is_not_resumed(remote, trusting, tmp_path):
    remote.stops_after = HALF
    with pytest.raises(InputError):
        weights.download("net", remote.url, tmp_path / "net.trch", context=trusting)
    remote.stops_after, remote.content = None, CONTENT[::-1]  # with the ETag of the other file
    path = weights.download("net", f"{remote.origin}/other", tmp_path / "net.trch", context=trusting)
    assert path.read_bytes() == CONTENT[::-1]


def test_unknown_length(remote, trusting):
    remote.tells_length = False
    seen = []
    path = weights.download("net", remote.url, on_progress=lambda *step: seen.append(step), context=trusting)
    assert path.read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), None)


def test_silent_server_times_out(remote, trusting, cache):
    remote.stops_after, remote.waits = HALF, True
    with pytest.raises(InputError, match="timed out"):
        weights.download("net", remote.url, context=trusting, timeout=0.3)
    assert not (cache / "net-final.trch").exists()


def test_refusals_name_the_address_and_the_place(remote, trusting, cache):
    remote.status = 404
    with pytest.raises(InputError, match="404") as error:
        weights.download("net", remote.url, context=trusting)
    assert remote.url in str(error.value)
    assert str(cache / "net-final.trch") in str(error.value)


def test_no_connection():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        with pytest.raises(InputError, match="refused"):
            weights.download("net", f"https://127.0.0.1:{silent.getsockname()[1]}/net.trch")


def test_too_little_disk_space_is_found_before_writing(remote, trusting, cache):
    remote.length = 10**18
    with pytest.raises(InputError, match="free some space"):
        weights.download("net", remote.url, context=trusting)
    assert (cache / "net-final.trch.part").stat().st_size == 0


def test_folder_that_cannot_be_made(remote, trusting, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file"):
        weights.download("net", remote.url, tmp_path / "file" / "net.trch", context=trusting)


DOWNLOADER = """
import resource, ssl, sys
from GradProjIOLib.models.weights import download
from GradProjIOLib.errors import InputError
url, certificate, limit = sys.argv[1:]
if int(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    download("net", url, context=ssl.create_default_context(cafile=certificate),
             on_progress=lambda received, total: print(received, flush=True))
except InputError as error:
    sys.exit(str(error))
"""


def start_download(remote, certificate, limit=0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOADER, remote.url, str(certificate), str(limit)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until_written(process: subprocess.Popen):
    for line in process.stdout:
        if int(line) > 0:
            return
    pytest.fail(process.stderr.read())


def test_second_process_is_refused_and_the_first_one_finishes(remote, certificate, cache):
    remote.stops_after, remote.waits = HALF, True
    first = start_download(remote, certificate)
    wait_until_written(first)
    second = start_download(remote, certificate)
    assert "Another process" in second.communicate(timeout=20)[1]
    assert second.returncode == 1
    remote.resumes.set()
    assert first.communicate(timeout=20)[1] == ""
    assert (cache / "net-final.trch").read_bytes() == CONTENT


def test_killed_process_leaves_no_lock_and_is_resumed(remote, certificate, trusting, cache):
    remote.stops_after, remote.waits = HALF, True
    process = start_download(remote, certificate)
    wait_until_written(process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    assert not (cache / "net-final.trch").exists()
    remote.stops_after, remote.waits = None, False
    assert weights.download("net", remote.url, context=trusting).read_bytes() == CONTENT
    assert remote.ranges[-1] is not None


def test_full_disk_while_writing(remote, certificate, cache):
    process = start_download(remote, certificate, limit=HALF)
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
    note = path.with_name("net.trch.sha256")
    assert weights.verify(path) == weights.checksum(path)
    assert not note.exists()
    weights.load_cached(path, SHAPES)
    assert note.read_text() == f"{weights.checksum(path)}  net.trch\n"
    assert names(path.parent) == {"net.trch", "net.trch.sha256"}
    torch.testing.assert_close(weights.load_cached(path, SHAPES), state())


def test_cached_file_that_changed_is_refused(path):
    torch.save(state(), path)
    weights.load_cached(path, SHAPES)
    torch.save({key: value + 1 for key, value in state().items()}, path)
    for check in (weights.verify, lambda path: weights.load_cached(path, SHAPES)):
        with pytest.raises(InputError, match="has changed since") as error:
            check(path)
        assert str(path) in str(error.value)
        assert "delete both files" in str(error.value)
    assert weights.load_state(path, SHAPES), "a file that the user names is not bound to a checksum"


def test_bad_first_file_leaves_no_checksum(path):
    torch.save(state() | {"conv.bias": torch.zeros(5)}, path)
    with pytest.raises(InputError):
        weights.load_cached(path, SHAPES)
    assert names(path.parent) == {"net.trch"}


def test_new_download_replaces_file_and_checksum(remote, trusting, path):
    torch.save(state(), path)
    weights.load_cached(path, SHAPES)
    torch.save({key: value + 1 for key, value in state().items()}, path.with_suffix(".new"))
    remote.content = path.with_suffix(".new").read_bytes()
    weights.download("net", remote.url, path, context=trusting)
    assert torch.equal(weights.load_cached(path, SHAPES)["conv.bias"], state()["conv.bias"] + 1)


def test_checksum(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert weights.checksum(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(InputError, match="No such file"):
        weights.checksum(tmp_path / "b")
