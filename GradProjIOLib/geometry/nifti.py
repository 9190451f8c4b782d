"""What the package knows about NIfTI files beyond ITK, which reads them: whether they are whole, and where they lie."""

from __future__ import annotations

import gzip
import math
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from GradProjIOLib.errors import InputError
from GradProjIOLib.geometry.files import incomplete, path_text
from GradProjIOLib.geometry.lattice import RAS_TO_LPS, badly_placed, straight_affine

if TYPE_CHECKING:
    import nibabel
    import SimpleITK

PLACE = (
    *("pixdim", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("srow_x", "srow_y", "srow_z"),
)
"""The header fields that place a NIfTI image in space. ITK hangs where one of them is infinite."""
MILLIMETERS = {1: 1000.0, 2: 1.0, 3: 0.001}
"""A NIfTI header's unit of length in mm; ITK converts it."""


def is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def is_packed(path: Path) -> bool:
    return path.name.lower().endswith(".gz")


def complete_header(path: Path) -> nibabel.Nifti1Header | None:
    """The header of a NIfTI file; None where the file lacks data that it promises, which ITK reads as zeros."""
    try:
        with gzip.open(path) if is_packed(path) else open(path, "rb") as file:
            header = read_header(file.read(540))
            return header if header is not None and file.seek(0, os.SEEK_END) >= _nifti_length(header) else None
    except (OSError, EOFError, zlib.error):
        return None


@contextmanager
def readable_file(path: Path) -> Iterator[tuple[Path, nibabel.Nifti1Header | None, bool]]:
    """A file that ITK can read with the image in `path`, its NIfTI header, and whether its axes were straightened.

    It is `path` itself, or a temporary copy of a NIfTI file that is packed or whose axes are a little skewed. The
    header is None for other formats, whose readers notice missing data themselves. Raises InputError for a NIfTI file
    that is not complete, or whose place in space is no number.
    """
    if not is_nifti(path):
        yield path, None, False
        return
    with ExitStack() as stack:
        # Unpacking takes longer than anything else, so it is done only once.
        readable = stack.enter_context(_copy(path)) if is_packed(path) else path
        header = complete_header(readable)
        if header is None:
            raise incomplete(path)
        if not all(np.isfinite(header[name]).all() for name in PLACE):
            raise badly_placed(path_text(path))
        better = straight_affine(header.get_sform()) if header["sform_code"] else None
        if better is not None:
            if readable == path:
                readable = stack.enter_context(_copy(path))
            header.set_sform(better, int(header["sform_code"]))
            header.set_qform(better, int(header["sform_code"]))
            with open(readable, "r+b") as file:
                file.write(header.binaryblock)
        yield readable, header, better is not None


@contextmanager
def _copy(path: Path) -> Iterator[Path]:
    """A temporary copy of a NIfTI file, unpacked. Raises InputError for a broken file and where there is no space."""
    with tempfile.TemporaryDirectory(prefix="gradprojio-") as folder:
        copy = Path(folder) / "image.nii"
        try:
            with gzip.open(path) if is_packed(path) else open(path, "rb") as source, open(copy, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise incomplete(path) from error
        except OSError as error:
            raise InputError(
                f"{path} cannot be {'unpacked' if is_packed(path) else 'copied'} in {folder} ({error.strerror}); free "
                "some space, or set TMPDIR to another folder."
            ) from error
        yield copy


def check_place(image: SimpleITK.Image, header: nibabel.Nifti1Header | None, source: Path) -> None:
    """Raise InputError where ITK places an image with a NIfTI header neither by its sform nor by its qform.

    ITK takes the spacing from a field of its own, which may contradict them.
    """
    if header is None or not (header["sform_code"] or header["qform_code"]):
        return
    index = np.eye(4)[: image.GetDimension(), :3]
    corner = np.array(image.TransformContinuousIndexToPhysicalPoint([0.0] * image.GetDimension()))[:3]
    axes = [image.TransformContinuousIndexToPhysicalPoint(index[:, axis].tolist())[:3] - corner for axis in range(3)]
    found = RAS_TO_LPS[:3, :3] @ np.transpose(axes) / MILLIMETERS.get(int(header["xyzt_units"]) & 7, 1.0)
    said = [header.get_sform()] if header["sform_code"] else []
    from nibabel.spatialimages import HeaderDataError

    with suppress(HeaderDataError, ValueError):
        said += [header.get_qform()] if header["qform_code"] else []
    if not any(np.allclose(found, one[:3, :3], rtol=0, atol=0.01 * np.abs(one[:3, :3]).max()) for one in said):
        raise InputError(
            f"{path_text(source)} contradicts itself about its spacing and orientation (pixdim, sform, qform); "
            "correct its header or export it again."
        )


def read_header(start: bytes) -> nibabel.Nifti1Header | None:
    """The header at the start of a NIfTI-1 or NIfTI-2 file; None where there is none."""
    import nibabel

    for kind in (nibabel.Nifti1Header, nibabel.Nifti2Header):
        size = kind.template_dtype.itemsize
        if len(start) >= size:
            header = kind(start[:size], check=False)
            if header["sizeof_hdr"] == size and bytes(header["magic"])[:2] == b"n+":
                return header
    return None


def _nifti_length(header: nibabel.Nifti1Header) -> float:
    """Bytes of the whole file with this NIfTI header; infinity where the header makes no sense."""
    from nibabel.spatialimages import HeaderDataError

    rank, *lengths = header["dim"].tolist()
    begin = float(header["vox_offset"])
    if not 1 <= rank <= 7 or min(lengths[:rank]) < 1 or not (begin == 0 or begin >= len(header.binaryblock)):
        return math.inf
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope != 0 and not math.isnan(slope) and not math.isfinite(slope * intercept):
        return math.inf
    try:
        bytes_per_voxel = header.get_data_dtype().itemsize
    except (HeaderDataError, KeyError):
        return math.inf
    return begin + math.prod(lengths[:rank]) * bytes_per_voxel
