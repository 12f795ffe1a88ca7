"""DICOM files as pictures: pixels as a viewer shows them, and who the patient is without saying the name."""

import contextlib
import hashlib
import hmac
import io
from pathlib import Path

import numpy as np
from PIL import Image

MAGIC_AT, MAGIC = 128, b"DICM"
HEAD = 65536  # bytes that hold a file's header, with the identifiers that only its owner knows


def is_dicom(source: Path | str | bytes) -> bool:
    """Say whether a file (path or its bytes) begins as DICOM part 10 files do, whatever its name. Raises OSError."""
    if isinstance(source, bytes):
        return source[MAGIC_AT : MAGIC_AT + 4] == MAGIC
    with open(source, "rb") as file:
        return file.read(MAGIC_AT + 4)[MAGIC_AT:] == MAGIC


def open_dicom(source: Path | str | bytes) -> Image.Image:
    """Decode a DICOM file to a PIL image of mode "L" or "RGB", 8 bits a channel, as a viewer shows it at first.

    Grey: rescale slope and intercept, then the first window (or lookup table) of the header, else the range of
    the picture without its padding; MONOCHROME1 is inverted, so that more is brighter everywhere (DICOM PS3.3,
    C.7.6.3, C.11.1 and C.11.2). Raises ValueError with the reason: no pixels, several frames, too large, damaged.
    """
    header = _read(source)
    with _name_damage():
        frames, pixels = (
            int(header.get("NumberOfFrames") or 1),
            header.get("Rows", 0) * header.get("Columns", 0),
        )
    if "PixelData" not in header:
        raise ValueError("DICOM without pixels")
    if frames > 1:
        raise ValueError(f"DICOM with {frames} frames: save the one that counts as a file of its own")
    if pixels > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"more than {Image.MAX_IMAGE_PIXELS // 10**6} million pixels")
    with _name_damage("; where it is whole but compressed, install python-gdcm to read it"):
        return Image.fromarray(_render(header))


def _render(header) -> np.ndarray:
    """Return the picture of a dataset, uint8 (H, W) or (H, W, 3)."""
    from pydicom import pixels as processing

    stored = processing.pixel_array(header)  # colour comes as RGB
    if header.PhotometricInterpretation == "PALETTE COLOR":
        stored = processing.apply_color_lut(stored, header)
        return (stored >> 8 if stored.dtype == np.uint16 else stored).astype(np.uint8)
    if stored.ndim == 3:
        return (stored >> max(header.BitsStored - 8, 0)).astype(np.uint8)
    rescaled = processing.apply_modality_lut(stored, header)
    shown, low, high = _apply_window(rescaled, stored, header)
    shown_01 = np.clip((shown.astype(np.float64) - low) / max(high - low, 1e-9), 0, 1)
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown_01 = 1 - shown_01
    return np.round(shown_01 * 255).astype(np.uint8)


def describe_dicom(source: Path | str | bytes) -> dict:
    """Return how a DICOM file stores its picture: `format, mode, channels, bit_depth, frames`. Raises ValueError."""
    header = _read(source, stop_before_pixels=True)
    with _name_damage():
        return {
            "format": "DICOM",
            "mode": str(header.get("PhotometricInterpretation", "")),
            "channels": int(header.get("SamplesPerPixel", 1)),
            "bit_depth": int(header.get("BitsStored", 0)),
            "frames": int(header.get("NumberOfFrames") or 1),
        }


def name_patients(files: list[Path]) -> list[str]:
    """Return a name for the patient of each file: "dicom-" and 12 digits of a keyed hash, or "" where none is given.

    Hashed are the patient id and its issuer; the key (HMAC) is made of the headers of all files together, so the
    same files give the same names, and a list of hospital numbers cannot be tried out by who has not the files.
    Files that are no DICOM, or cannot be read, get "".
    """
    heads, patients = [], []
    for file in files:
        try:
            head, patient = _read_patient(file)
        except (OSError, ValueError):
            head, patient = b"", ""
        heads.append(hashlib.sha256(head).digest())
        patients.append(patient)
    key = hashlib.sha256(b"".join(sorted(heads))).digest()
    names = {patient: hmac.new(key, patient.encode(), "sha256").hexdigest()[:12] for patient in set(patients)}
    return [f"dicom-{names[patient]}" if patient else "" for patient in patients]


def _read_patient(file: Path) -> tuple[bytes, str]:
    if not file.is_file() or not is_dicom(file):
        return b"", ""
    header = _read(file, stop_before_pixels=True)
    with _name_damage():
        number, issuer = (str(header.get(tag) or "").strip() for tag in ("PatientID", "IssuerOfPatientID"))
    with open(file, "rb") as stream:
        return stream.read(HEAD), f"{number}\n{issuer}" if number else ""


def _read(source: Path | str | bytes, **options):
    import pydicom

    with _name_damage():
        return pydicom.dcmread(io.BytesIO(source) if isinstance(source, bytes) else source, **options)


@contextlib.contextmanager
def _name_damage(hint: str = ""):
    """Turn what pydicom raises on damaged bytes (it can be anything, also when a value is first used) into ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = (
            "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
            or type(error).__name__
        )
        raise ValueError(f"damaged DICOM ({reason[:200]}){hint}") from None


def _apply_window(rescaled: np.ndarray, stored: np.ndarray, header) -> tuple[np.ndarray, float, float]:
    """Return the picture (H, W) after the header's window or lookup table, and the values of black and white."""
    from pydicom import pixels as processing

    if "VOILUTSequence" in header:
        bits = header.VOILUTSequence[0].LUTDescriptor[2]
        return processing.apply_voi(rescaled, header), 0.0, 2.0**bits - 1
    if header.get("WindowWidth") is not None and header.get("WindowCenter") is not None:
        centre, width = (
            np.atleast_1d(header[name].value).astype(float)[0] for name in ("WindowCenter", "WindowWidth")
        )
        far = np.array([centre - 100 * width, centre + 100 * width])  # what is below and above every window
        low, high = processing.apply_windowing(far, header)
        return processing.apply_windowing(rescaled, header), low, high
    padding = header.get("PixelPaddingValue")
    shown = rescaled[stored != padding] if padding is not None and (stored != padding).any() else rescaled
    return rescaled, float(shown.min()), float(shown.max())
