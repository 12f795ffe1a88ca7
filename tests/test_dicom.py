"""DICOM: the picture as a viewer shows it, the patient without the name, no identifying tag in the manifest."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from medaug import dicom, images, sources


def save_dicom(path, stored: np.ndarray, **tags):
    """Write `stored`, (H, W) or (H, W, 3) integers, with the header of a radiograph; `tags` go into it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[str(path)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "4711", "19700101"
    data.PhotometricInterpretation = "MONOCHROME2" if stored.ndim == 2 else "RGB"
    data.Rows, data.Columns = stored.shape[:2]
    data.SamplesPerPixel = 1 if stored.ndim == 2 else 3
    if stored.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = 8 * stored.dtype.itemsize
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(stored.dtype.kind == "i")
    data.PixelData = stored.tobytes()
    compressed = tags.pop("compressed", False)
    for tag, value in tags.items():
        setattr(data, tag, value)
    data["PixelData"].VR = "OW"
    if compressed:
        data.compress(RLELossless)
    data.save_as(path, enforce_file_format=True)
    return path


def ramp(low: int, high: int, dtype=np.uint16) -> np.ndarray:
    """Grey from dark left to bright right, (30, 40)."""
    return np.repeat(np.linspace(low, high, 40).astype(dtype)[None], 30, axis=0)


def expected(stored: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.round(np.clip((stored.astype(float) - low) / (high - low), 0, 1) * 255).astype(int)


def read(path) -> np.ndarray:
    image_u8 = np.asarray(images.open_image(path))
    assert image_u8.dtype == np.uint8
    return image_u8.astype(int)


# ---------------------------------------------------------------- pixels


def test_without_a_window_the_range_of_the_picture_is_shown(tmp_path):
    stored = ramp(300, 3900)
    np.testing.assert_array_equal(read(save_dicom(tmp_path / "a.dcm", stored, BitsStored=12, HighBit=11)),
                                  expected(stored, 300, 3900))  # fmt: skip


def test_slope_and_intercept_come_before_the_window(tmp_path):
    stored = ramp(-900, 2000, np.int16)
    path = save_dicom(tmp_path / "a.dcm", stored, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=1000, WindowWidth=1000)
    # the linear function of PS3.3 C.11.2.1.2: from c - 0.5 - (w - 1) / 2 to c - 0.5 + (w - 1) / 2
    assert abs(read(path) - expected(2 * stored.astype(float) - 100, 500, 1499)).max() <= 1


def test_the_first_of_several_windows_counts(tmp_path):
    stored = ramp(0, 4000)
    path = save_dicom(tmp_path / "a.dcm", stored, WindowCenter=[2000, 100], WindowWidth=[1000, 10])
    assert abs(read(path) - expected(stored, 1500, 2499)).max() <= 1


def test_a_lookup_table_is_applied(tmp_path):
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 8], list(range(255, -1, -1))  # a negative
    table["LUTDescriptor"].VR = table["LUTData"].VR = "US"
    stored = ramp(0, 255, np.uint8)
    path = save_dicom(tmp_path / "a.dcm", stored, VOILUTSequence=Sequence([table]))
    np.testing.assert_array_equal(read(path), 255 - stored.astype(int))


def test_monochrome1_is_inverted(tmp_path):
    stored = ramp(0, 4095)
    plain = read(save_dicom(tmp_path / "a.dcm", stored))
    inverted = read(save_dicom(tmp_path / "b.dcm", 4095 - stored, PhotometricInterpretation="MONOCHROME1"))
    assert plain[0, 0] == 0 and plain[0, -1] == 255
    assert abs(plain - inverted).max() <= 1


def test_padding_does_not_take_part_in_the_range(tmp_path):
    stored = ramp(1000, 2000, np.int16)
    stored[:10] = -2000
    path = save_dicom(tmp_path / "a.dcm", stored, PixelPaddingValue=-2000)
    shown = read(path)
    assert shown[:10].max() == 0 and (shown[20, 0], shown[20, -1]) == (0, 255)


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_every_bit_depth_gives_the_same_picture(tmp_path, bits):
    dtype = np.uint8 if bits == 8 else np.uint16
    path = save_dicom(tmp_path / "a.dcm", ramp(0, 2**bits - 1, dtype), BitsStored=bits, HighBit=bits - 1)
    assert abs(read(path) - expected(ramp(0, 255), 0, 255)).max() <= 3
    assert images.describe_image(path) == {"format": "DICOM", "mode": "MONOCHROME2", "channels": 1, "bit_depth": bits,
                                           "frames": 1}  # fmt: skip


def test_colour_and_run_length_compression(tmp_path):
    rgb = np.dstack([ramp(0, 255, np.uint8)] * 2 + [np.zeros((30, 40), np.uint8)])
    for name, compressed in (("plain.dcm", False), ("rle.dcm", True)):
        path = save_dicom(tmp_path / name, rgb, compressed=compressed)
        np.testing.assert_array_equal(np.asarray(images.open_image(path, "RGB")), rgb)


def test_what_cannot_be_shown_says_why(tmp_path):
    whole = save_dicom(tmp_path / "a.dcm", ramp(0, 99)).read_bytes()
    for data, reason in ((whole[:-100], "damaged DICOM"), (whole[:200], "DICOM")):
        with pytest.raises(ValueError, match=reason):
            images.open_image(data)
    with pytest.raises(ValueError, match="3 frames: save the one"):
        images.open_image(save_dicom(tmp_path / "b.dcm", ramp(0, 99), NumberOfFrames=3))
    with pytest.raises(ValueError, match="million pixels"):
        images.open_image(save_dicom(tmp_path / "c.dcm", ramp(0, 99), Rows=60_000, Columns=60_000))


# ---------------------------------------------------------------- patients


def test_patients_are_told_apart_and_not_named(tmp_path):
    numbers = ["4711", "4711", "0815", "", "4711"]
    files = [save_dicom(tmp_path / f"{n}.dcm", ramp(0, 99 + n), PatientID=number) for n, number in enumerate(numbers)]
    save_dicom(files[4], ramp(0, 99), PatientID="4711", IssuerOfPatientID="another hospital")
    names = dicom.name_patients(files)
    assert names[0] == names[1] and len({names[0], names[2], names[4]}) == 3 and names[3] == ""
    assert all(not name or (name.startswith("dicom-") and len(name) == 18) for name in names)
    assert not any(number in name for name in names for number in ("4711", "0815"))
    assert dicom.name_patients(files) == names  # the same files, the same names
    assert dicom.name_patients(files[:4])[0] != names[0]  # who has not the same files cannot try numbers out
    Image.fromarray(ramp(0, 99, np.uint8)).save(tmp_path / "plain.png")
    assert dicom.name_patients([tmp_path / "plain.png", tmp_path / "gone.dcm"]) == ["", ""]


def make_films(folder, suffix: str = ".dcm"):
    """Two classes of twenty films, two of each patient; returns the folder."""
    rng = np.random.default_rng(0)
    for label in ("sick", "well"):
        for n in range(20):
            stored = rng.integers(0, 4096, (24, 24)).astype(np.uint16)
            save_dicom(folder / label / f"f{n:02d}{suffix}", stored, BitsStored=12, HighBit=11, PatientID=f"{label}4711{n // 2}")
    return folder


@pytest.mark.parametrize("suffix", [".dcm", ""])
def test_a_folder_of_films_becomes_a_manifest_without_identities(tmp_path, suffix):
    folder = make_films(tmp_path / "films", suffix)
    manifest = sources.build_manifest("folder", tmp_path / "run", str(folder))
    assert len(manifest) == 40 and manifest["patient_id"].nunique() == 20
    assert manifest.groupby("patient_id")["split"].nunique().max() == 1
    card = sources.read_card(tmp_path / "run")
    assert card["patient_key"] == "patient id in the DICOM header, hashed"
    written = json.dumps(card) + manifest.to_csv() + "".join(
        pd.read_parquet(file).drop(columns="thumbnail", errors="ignore").to_csv()
        for file in (tmp_path / "run").rglob("*.parquet")
    )  # fmt: skip
    for secret in ("Doe", "Jane", "4711", "19700101"):
        assert secret not in written.replace(str(tmp_path), "")
    images_u8 = images.load_images(manifest, tmp_path / "run", 16)
    assert images_u8.shape == (40, 16, 16) and images_u8.std() > 10


def test_a_table_of_films_takes_patients_from_the_headers_unless_it_names_them(tmp_path):
    make_films(tmp_path)
    rows = [{"path": f"{label}/f{n:02d}.dcm", "label": label} for label in ("sick", "well") for n in range(20)]
    pd.DataFrame(rows).to_csv(tmp_path / "films.csv", index=False)
    manifest = sources.build_manifest("manifest", tmp_path / "a", str(tmp_path / "films.csv"))
    assert manifest["patient_id"].nunique() == 20 and manifest["patient_id"].str.startswith("dicom-").all()
    pd.DataFrame(rows).assign(patient_id=[f"p{n // 4}" for n in range(40)]).to_csv(tmp_path / "films.csv", index=False)
    manifest = sources.build_manifest("manifest", tmp_path / "b", str(tmp_path / "films.csv"), val_fraction=0.5, test_fraction=0.5)
    assert set(manifest["patient_id"]) == {f"p{n}" for n in range(10)}
