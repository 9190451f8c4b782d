"""Headers with anything in them: a clear refusal or a right result, and never a traceback, a hang or much memory.

One process reads all of them with a limit on its memory, and says which one it reads, so that a crash has a name.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

SECONDS = 20
SHAPE = (5, 6, 7)
VOXELS = np.arange(np.prod(SHAPE), dtype=np.int16).reshape(SHAPE)
NUMBERS = st.one_of(st.sampled_from([0, 1, -1, 2, 3, 4, 5, 7, 16, 64, 352, 512, 1024, 32767, -32768]),
                    st.integers(-(2**15), 2**15 - 1))  # fmt: skip
REALS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 352.0, 1e-30, 1e30, float("nan"), float("inf"), -float("inf")]),
                  st.floats(width=32), st.floats(-3, 3, width=32))  # fmt: skip
NIFTI_FIELDS = {
    "dim": st.lists(NUMBERS, min_size=8, max_size=8), "datatype": NUMBERS, "bitpix": NUMBERS,
    "pixdim": st.lists(REALS, min_size=8, max_size=8), "vox_offset": REALS, "scl_slope": REALS, "scl_inter": REALS,
    "xyzt_units": st.integers(0, 255), "qform_code": NUMBERS, "sform_code": NUMBERS, "quatern_b": REALS,
    "quatern_c": REALS, "quatern_d": REALS, "qoffset_x": REALS, "srow_x": st.lists(REALS, min_size=4, max_size=4),
    "srow_y": st.lists(REALS, min_size=4, max_size=4), "srow_z": st.lists(REALS, min_size=4, max_size=4),
    "intent_code": NUMBERS, "sizeof_hdr": NUMBERS, "slice_code": st.integers(0, 255), "magic": st.binary(max_size=4),
}  # fmt: skip
NRRD_FIELDS = {
    "type": st.sampled_from(["short", "int16", "float", "double", "uchar", "block", "int64", "nonsense", ""]),
    "dimension": st.one_of(NUMBERS, st.just("three")),
    "space": st.sampled_from(["left-posterior-superior", "RAS", "scanner-xyz", "nowhere", ""]),
    "sizes": st.lists(NUMBERS, max_size=5), "space directions": st.lists(st.lists(REALS, min_size=3, max_size=3),
                                                                        max_size=4),
    "kinds": st.lists(st.sampled_from(["domain", "vector", "list", "?"]), max_size=4),
    "endian": st.sampled_from(["little", "big", "middle"]),
    "encoding": st.sampled_from(["raw", "gzip", "bzip2", "ascii", "hex", "odd"]),
    "space origin": st.lists(REALS, min_size=2, max_size=4), "byte skip": NUMBERS, "line skip": NUMBERS,
    "data file": st.sampled_from(["elsewhere.raw", "/dev/zero", "LIST", "skip %d 1 9 1"]),
}  # fmt: skip
NRRD = {
    "type": "short", "dimension": 3, "space": "left-posterior-superior", "sizes": [7, 6, 5],
    "space directions": [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]], "kinds": ["domain"] * 3, "endian": "little",
    "encoding": "raw", "space origin": [0.0, 0.0, 0.0],
}  # fmt: skip


def nifti(changes: dict, cut: int) -> bytes:
    """A good file with fields of its header changed, and perhaps cut off."""
    header = nibabel.Nifti1Image(VOXELS.T, np.diag([1.0, 2.0, 3.0, 1.0])).header
    header["vox_offset"], header["magic"] = 352, b"n+1"
    header["scl_slope"], header["scl_inter"] = 1, 0
    for name, value in changes.items():
        with np.errstate(all="ignore"):
            header[name] = value
    content = header.binaryblock + bytes(4) + VOXELS.tobytes()
    return content[: len(content) - cut]


def nrrd(changes: dict, cut: int) -> bytes:
    lines = ["NRRD0004"]
    for name, value in (NRRD | changes).items():
        if name == "space directions":
            value = " ".join(f"({','.join(map(str, axis))})" for axis in value)
        elif name == "space origin":
            value = f"({','.join(map(str, value))})"
        elif isinstance(value, list):
            value = " ".join(map(str, value))
        lines.append(f"{name}: {value}")
    content = "\n".join([*lines, "", ""]).encode() + VOXELS.tobytes()
    return content[: len(content) - cut]


def some_of(fields: dict):
    """A few of the fields with values of their own."""
    names = st.lists(st.sampled_from(sorted(fields)), max_size=4, unique=True)
    return names.flatmap(lambda chosen: st.fixed_dictionaries({name: fields[name] for name in chosen}))


READER = """if True:
    import json, sys, time, traceback
    import numpy as np
    from GradProjIOLib.errors import InputError
    from GradProjIOLib.geometry.image_files import read_volume
    from GradProjIOLib.geometry.volume import check_image
    import SimpleITK
    for line in sys.stdin:
        path = line.strip()
        start = time.monotonic()
        try:
            volume = read_volume(path)
            check_image(volume)
            found = ["read", list(volume.shape), volume.array.dtype.name, volume.affine.tolist(),
                     volume.array.ravel()[:3].astype(float).tolist()]
        except InputError as error:
            found = ["refused", str(error)]
        except BaseException:
            found = ["failed", traceback.format_exc()]
        # getrusage would count what the parent had when it started this process.
        status = open("/proc/self/status").read()
        peak = int(status.split("VmHWM:")[1].split()[0])
        print(json.dumps([*found, time.monotonic() - start, peak]), flush=True)
"""


@pytest.fixture(scope="module")
def reader():
    """A process that reads images, with at most 2 GB of memory in use."""
    process = None

    def read(path):
        nonlocal process
        if process is None or process.poll() is not None:
            process = subprocess.Popen([sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL, text=True)  # fmt: skip
        process.stdin.write(f"{path}\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], SECONDS)
        if not ready:
            process.kill()
            raise AssertionError(f"reading took more than {SECONDS} s")
        answer = process.stdout.readline()
        assert answer, f"reading ended the process with {process.wait()}"
        return json.loads(answer)

    yield read
    if process is not None:
        process.stdin.close()
        process.wait(timeout=30)


def check(reader, path) -> None:
    kind, *content, seconds, peak_kilobytes = reader(path)
    assert kind in ("read", "refused"), content[0]
    assert seconds < SECONDS
    assert peak_kilobytes < 2 * 2**20
    if kind == "refused":
        assert path.name in content[0]
        assert len(content[0].split()) > 5
        return
    shape, _, affine, _ = content
    affine = np.array(affine)
    assert min(shape) >= 5
    assert np.isfinite(affine).all()
    assert abs(np.linalg.det(affine[:3, :3])) > 0
    if path.suffix == ".nii":
        expected = nibabel.load(path)
        assert shape == list(expected.shape[2::-1])
        header = nibabel.Nifti1Header(path.read_bytes()[:348], check=False)
        said = [header.get_sform()] * bool(header["sform_code"])
        with contextlib.suppress(ValueError, nibabel.spatialimages.HeaderDataError):
            said += [header.get_qform()] if header["qform_code"] else []
        # ITK converts the unit of length; SimpleITK's reader is the reference for the values (see test_volume.py).
        affine /= {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
        apart = [np.abs(affine[:3, :3] - form[:3, :3]).max() for form in said]
        assert min(apart, default=0) < 0.02 * np.abs(affine[:3, :3]).max()
        if header["scl_slope"] != 0 and not np.isnan(header["scl_slope"]) and header["vox_offset"] >= 352:
            first = np.asanyarray(expected.dataobj).T.ravel()[:3]
            np.testing.assert_allclose(content[3], first, rtol=1e-5)


def fuzz(count: int):
    """The same examples in every run."""
    return settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))  # fmt: skip


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["nii", "nrrd"])
def test_any_header_is_refused_in_a_sentence_or_read_right(reader, tmp_path, kind, count):
    make, fields = (nifti, NIFTI_FIELDS) if kind == "nii" else (nrrd, NRRD_FIELDS)
    path = tmp_path / f"fuzzed.{kind}"
    path.write_bytes(make({}, 0))
    first = reader(path)
    assert first[:3] == ["read", list(SHAPE), "int16"]

    @seed(14)
    @fuzz(count)
    @given(some_of(fields), st.sampled_from([0, 0, 0, 1, 100, 300]))
    def try_one(changes, cut):
        path.write_bytes(make(changes, cut))
        check(reader, path)

    try_one()
