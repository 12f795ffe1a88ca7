"""Damaged and awkward files: the audit goes to the end, names each with its reason or reads it, and loses none."""

import io
import json
import os
import re
import socket
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from medaug import folder_audit, images

READ = ""  # the expectation of a file that is awkward but whole


def ramp(width: int = 48, height: int = 40) -> np.ndarray:
    return np.repeat(np.linspace(5, 250, width).astype(np.uint8)[None], height, axis=0)


def encode(image, format: str = "PNG", **options) -> bytes:
    written = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(written, format=format, **options)
    return written.getvalue()


def encode_noise(format: str = "PNG", **options) -> bytes:
    return encode(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8), format, **options)


def claim_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says in its header that it is very large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def encode_dicom(pixels: bytes | None = None, **tags) -> bytes:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = SecondaryCaptureImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["damaged"])
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    data.PatientID = "17"
    if pixels is not None:
        data.Rows, data.Columns, data.SamplesPerPixel = 40, 48, 1
        data.PhotometricInterpretation, data.PixelRepresentation = "MONOCHROME2", 0
        data.BitsAllocated = data.BitsStored = 8
        data.HighBit, data.PixelData = 7, pixels
        data["PixelData"].VR = "OB"
    for tag, value in tags.items():
        setattr(data, tag, value)
    written = io.BytesIO()
    data.save_as(written, enforce_file_format=True)
    return written.getvalue()


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def pack(members: dict[str, bytes], flag: int = 0, external_attr: int = 0, damage: bool = False) -> bytes:
    """A zip of `members`; `flag` sets bits of every member's header (1: encrypted), `damage` breaks the content."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = external_attr, zipfile.ZIP_DEFLATED
            archive.writestr(info, data)
    data = bytearray(written.getvalue())
    if flag:
        for signature, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = data.find(signature)
            while place >= 0:
                data[place + at] |= flag
                place = data.find(signature, place + 4)
    if damage:
        data[60:80] = bytes(20)
    return bytes(data)


def list_contents() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, pattern of the reason; "" where the file is to be read)."""
    grey = ramp()
    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    whole_dicom = encode_dicom(grey.tobytes())
    wide = np.zeros((8, 20_000), np.uint8)
    return {
        # broken
        "empty.png": (b"", "the file is empty"),
        "empty.dcm": (b"", "the file is empty"),
        "text.png": (b"this is text", "not an image"),
        "page.jpg": (b"<html><body>404 Not Found</body></html>", "not an image"),
        "zeros.tif": (bytes(5000), "not an image"),
        "random.jpeg": (np.random.default_rng(1).bytes(3000), "not an image"),
        "only-signature.png": (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
        "truncated.png": (encode_noise()[:2000], "damaged"),
        "truncated.jpg": (encode_noise("JPEG")[:1500], "damaged"),
        "truncated.tif": (encode_noise("TIFF", compression="tiff_lzw")[:2500], "damaged|not an image"),
        "truncated.bmp": (encode_noise("BMP")[:3000], "damaged"),
        "truncated.webp": (encode_noise("WEBP", lossless=True)[:1500], "damaged|not an image"),
        "truncated.gif": (encode_noise("GIF")[:1500], "damaged"),
        "header-only.jpg": (encode_noise("JPEG")[:20], "not an image|damaged"),
        "flipped-bytes.png": (encode_noise()[:900] + bytes(64) + encode_noise()[964:], "damaged"),
        "bad-checksum.png": (encode_noise()[:29] + b"\0\0\0\0" + encode_noise()[33:], "damaged|not an image"),
        "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not an image"),
        "bomb.png": (claim_size(60_000, 60_000), "million pixels"),
        "large.png": (claim_size(12_000, 12_000), "million pixels"),
        "no-pixels.dcm": (encode_dicom(), "DICOM without pixels"),
        "truncated.dcm": (whole_dicom[:-500], "damaged DICOM"),
        "cut-header.dcm": (whole_dicom[:160], "DICOM"),
        "two-frames.dcm": (encode_dicom(grey.tobytes() * 2, NumberOfFrames=2), "DICOM with 2 frames"),
        "text.dcm": (b"this is text", "not an image"),
        # whole, but awkward
        "cmyk.jpg": (encode(rgb.convert("CMYK"), "JPEG"), READ),
        "sixteen.png": (encode(grey.astype(np.uint16) * 257), READ),
        "sixteen.tif": (encode(grey.astype(np.uint16) * 16, "TIFF"), READ),
        "float.tif": (encode(grey.astype(np.float32) / 255, "TIFF"), READ),
        "nan.tif": (encode(np.full((9, 9), np.nan, np.float32), "TIFF"), "not finite"),
        "palette.png": (encode(palette), READ),
        "transparent-palette.png": (encode(palette, transparency=0), READ),
        "alpha.png": (encode(rgb.convert("RGBA")), READ),
        "grey-alpha.png": (encode(rgb.convert("LA")), READ),
        "one-bit.png": (encode(Image.fromarray(grey > 100)), READ),
        "rotated.jpg": (encode(np.rot90(grey), "JPEG", exif=rotated()), READ),
        "bad-exif.jpg": (encode(grey, "JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff"), READ),
        "wide.png": (encode(wide), READ),
        "one-pixel.png": (encode(grey[:1, :1]), READ),
        "animated.gif": (encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]), READ),
        "pages.tif": (encode(rgb, "TIFF", save_all=True, append_images=[rgb]), READ),
        "really-png.jpg": (encode(grey), READ),
        "SHOUTING.PNG": (encode(grey), READ),
        "no-suffix": (encode(grey), READ),
        "dicom-no-suffix": (whole_dicom, READ),
        "strange.dat": (encode(grey, "JPEG"), READ),
        "trailing.png": (encode(grey) + b"appended by some software", READ),
        "name with spaces, 'quotes' & <b>.png": (encode(grey), READ),
        "böse-Ümläute-影像.png": (encode(grey), READ),
        "-starts-with-a-dash.png": (encode(grey), READ),
        # archives
        "encrypted.zip": (pack({"secret.png": encode(grey)}, flag=1), "encrypted"),
        "leaves.zip": (pack({"../leaves.png": encode(grey)}), "leads out of the folder"),
        "absolute.zip": (pack({"/tmp/absolute.png": encode(grey)}), "leads out of the folder"),
        "drive.zip": (pack({"C:\\windows\\drive.png": encode(grey)}), "leads out of the folder"),
        "backslashes.zip": (pack({"..\\backslashes.png": encode(grey)}), "leads out of the folder"),
        "linked.zip": (pack({"linked.png": b"/etc/passwd"}, external_attr=0o120777 << 16), "a link or device"),
        "bomb.zip": (pack({"zip-bomb.png": bytes(80 * 2**20)}), "zip bomb"),
        "bad-content.zip": (pack({"bad-content.png": encode_noise()}, damage=True), "cannot be unpacked"),
        "nested.zip": (pack({"inner.zip": pack({"deep.png": encode(grey)})}), "a zip inside a zip"),
        "text.zip": (b"this is text", "a zip that cannot be read"),
        "cut.zip": (pack({"cut.png": encode_noise()})[:200], "a zip that cannot be read"),
    }  # fmt: skip


def list_awkward_places(folder: Path) -> dict[str, str]:
    """Make what is awkward by its place or kind, not by its content; return name -> pattern of the reason."""
    made = {"twice.png": READ, "sub/twice.png": READ, "two.jpg": READ, "two.png": READ}
    for name in made:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encode(ramp(), "JPEG" if name.endswith("jpg") else "PNG"))
    (folder / "a-folder.png").mkdir()
    (folder / "a-folder.png" / "inside.png").write_bytes(encode(ramp()))
    os.symlink(folder, folder / "sub" / "loop")
    os.symlink("circle.png", folder / "circle.png")
    os.symlink("nowhere", folder / "dangling.png")
    os.symlink("/dev/zero", folder / "endless.png")
    os.symlink(folder / "twice.png", folder / "linked.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as door:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket may have 108 bytes
        door.bind("door.png")
        os.chdir(here)
    (folder / "unreadable.png").write_bytes(encode(ramp()))
    (folder / "unreadable.png").chmod(0)
    may = os.access(folder / "unreadable.png", os.R_OK)  # root may read all
    with zipfile.ZipFile(folder / "double.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("double.png", encode(ramp()))
        archive.writestr("double.png", encode_noise())
    made |= {
        "a-folder.png/inside.png": READ, "linked.png": READ, "sub/loop": "a link to a folder", "double.zip/double.png": "",
        "circle.png": "cannot be read", "dangling.png": "cannot be read", "endless.png": "not a file",
        "pipe.png": "not a file", "door.png": "not a file", "unreadable.png": READ if may else "cannot be read",
    }  # fmt: skip
    (folder / "two\nlines\x1b[31m.png").write_bytes(encode(ramp()))
    made["two\\nlines\\x1b[31m.png"] = READ
    try:
        (folder / os.fsdecode(b"no-utf-8-\xff.png")).write_bytes(encode(ramp()))
        made["no-utf-8-\\udcff.png"] = READ
    except OSError:
        pass  # a file system that takes UTF-8 names only cannot hold this one
    return made


def name_members(name: str, data: bytes) -> str:
    """The name under which the audit reports a file of `list_contents`: for a zip with content, its member."""
    if name in ("text.zip", "cut.zip") or not name.endswith(".zip"):
        return name
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return f"{name}/{archive.namelist()[0]}"


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder, and what is expected: name -> pattern of the reason, "" for a file that is read."""
    folder = tmp_path_factory.mktemp("damaged")
    expected = {}
    for name, (data, reason) in list_contents().items():
        (folder / name).write_bytes(data)
        expected[name_members(name, data)] = reason
    return folder, expected | list_awkward_places(folder)


@pytest.fixture(scope="module")
def report(damaged, tmp_path_factory) -> dict:
    """What `medaug audit` finds there, run as a user would, with an empty cache."""
    place = tmp_path_factory.mktemp("written")
    done = subprocess.run(
        [sys.executable, "-m", "medaug.cli", "audit", str(damaged[0]), "--json", str(place / "a.json"),
         "--html", str(place / "a.html"), "--cache", str(place / "cache"), "--pictures"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr
    page = (place / "a.html").read_text(encoding="utf-8")
    assert "&#39;quotes&#39; &amp; &lt;b&gt;.png" in page and "<b>.png" not in page
    return json.loads((place / "a.json").read_text(encoding="utf-8")) | {"terminal": done.stdout}


def test_the_folder_is_as_nasty_as_promised(damaged):
    assert len(damaged[1]) >= 40 and sum(bool(reason) for reason in damaged[1].values()) >= 25


def test_no_file_is_lost(damaged, report):
    files = report["files"]
    assert files["found"] == files["images"] + files["failed"] + files["others"]
    named = {row["file"] for row in report["failed"]} | {row["file"] for row in report["others"]}
    assert len(named) == files["failed"] + files["others"]
    whole = {name for name, reason in damaged[1].items() if reason == READ}
    assert files["images"] == len(whole)
    assert files["found"] == len(damaged[1]) + 1
    assert report["terminal"].startswith(f"{damaged[0]}: {files['found']} files = {files['images']} images + ")


def test_each_failure_is_named_with_its_reason(damaged, report):
    reasons = {row["file"]: row["reason"] for row in report["failed"] + report["others"]}
    for name, pattern in damaged[1].items():
        if pattern:
            assert name in reasons, f"{name} should have failed"
            assert re.search(pattern, reasons[name]), f"{name}: {reasons[name]}"
        elif name != "double.zip/double.png":
            assert name not in reasons, f"{name}: {reasons[name]}"
    assert "second file of the same name" in reasons["double.zip/double.png"]
    assert all("\n" not in reason and len(reason) < 400 for reason in reasons.values())


def test_nothing_was_written_outside(damaged):
    assert not list(damaged[0].parent.glob("*leaves.png")) and not Path("/tmp/absolute.png").exists()
    assert not list(damaged[0].rglob("*backslashes.png"))


def test_what_is_not_what_it_seems_is_noted(report):
    notes = {row["file"]: row["note"] for row in report["notes"]}
    assert notes["really-png.jpg"] == "is a PNG file, called .jpg"
    assert notes["animated.gif"] == notes["pages.tif"] == "holds 2 frames: only the first is read"
    assert "is a JPEG file, called .dat" in notes["strange.dat"]


def test_the_awkward_ones_are_read_as_the_picture_they_are(damaged):
    for name in ("cmyk.jpg", "sixteen.png", "sixteen.tif", "float.tif", "palette.png", "alpha.png", "grey-alpha.png",
                 "rotated.jpg", "bad-exif.jpg", "really-png.jpg", "trailing.png", "dicom-no-suffix"):  # fmt: skip
        image_u8 = np.asarray(images.open_image(damaged[0] / name)).astype(int)
        assert image_u8.shape == (40, 48), name
        assert abs(image_u8 - ramp()).max() <= 8, name


def test_a_second_look_says_the_same(damaged, tmp_path):
    first, second = (folder_audit.audit_path(damaged[0], cache=tmp_path) for _ in range(2))
    assert first == second and (tmp_path / os.listdir(tmp_path)[0]).suffix == ".parquet"
