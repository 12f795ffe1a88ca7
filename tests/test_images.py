"""Decoding: every kind of file becomes the same kind of array, once, and errors name the file."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medaug import images


def ramp(width: int = 40, height: int = 30) -> np.ndarray:
    """A smooth grey image, uint8 (height, width), dark left to bright right."""
    return np.repeat(np.linspace(10, 240, width).astype(np.uint8)[None], height, axis=0)


def save_ramps(folder, count: int = 6) -> pd.DataFrame:
    for index in range(count):
        Image.fromarray(np.roll(ramp(), index * 3, axis=1)).save(folder / f"{index}.png")
    return pd.DataFrame({"path": [f"{index}.png" for index in range(count)]})


def test_order_shape_and_range_follow_the_frame(tmp_path):
    frame = save_ramps(tmp_path)
    images_u8 = images.load_images(frame, tmp_path, 16)
    assert images_u8.shape == (6, 16, 16) and images_u8.dtype == np.uint8
    shuffled = images.load_images(frame.iloc[[4, 0, 4]], tmp_path, 16)
    np.testing.assert_array_equal(shuffled, images_u8[[4, 0, 4]])
    assert images.load_images(frame, tmp_path, 16, mode="RGB").shape == (6, 16, 16, 3)


def test_a_square_of_the_right_size_is_kept_exactly_and_a_wide_one_is_cut_at_the_centre(tmp_path):
    square = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
    Image.fromarray(square).save(tmp_path / "square.png")
    wide = np.zeros((24, 72), np.uint8)
    wide[:, 24:48] = square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    loaded = images.load_images(pd.DataFrame({"path": ["square.png", "wide.png"]}), tmp_path, 24)
    np.testing.assert_array_equal(loaded[0], square)
    np.testing.assert_array_equal(loaded[1], square)


def test_the_cache_is_memory_mapped_and_decodes_only_what_is_new(tmp_path, monkeypatch):
    frame, decoded = save_ramps(tmp_path), []
    decode = images._decode
    monkeypatch.setattr(images, "_decode", lambda *args: decoded.append(args[1].name) or decode(*args))
    images.load_images(frame.iloc[:4], tmp_path, 16)
    images.load_images(frame, tmp_path, 16)
    again = images.load_images(frame.iloc[:4], tmp_path, 16)
    assert sorted(decoded) == [f"{index}.png" for index in range(6)]
    assert isinstance(again, np.memmap)
    again[:] = 0  # copy-on-write: the file must not change
    assert images.load_images(frame.iloc[:4], tmp_path, 16).max() > 0


def test_a_changed_file_is_decoded_again_or_refused(tmp_path):
    frame = save_ramps(tmp_path, 2)
    before = np.array(images.load_images(frame, tmp_path, 16))
    frame["sha256"] = [images.hash_bytes((tmp_path / name).read_bytes()) for name in frame["path"]]
    Image.fromarray(ramp()[:, ::-1]).save(tmp_path / "0.png")
    after = images.load_images(frame.drop(columns="sha256"), tmp_path, 16)
    assert (after[0] != before[0]).any() and (after[1] == before[1]).all()
    with pytest.raises(ValueError, match="0.png has changed since the manifest"):
        images.load_images(frame, tmp_path, 20)


def variant_files(folder) -> dict[str, str]:
    grey = ramp()
    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    alpha = np.dstack([np.stack([grey] * 3, -1), np.full(grey.shape, 255, np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    rgb.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(folder / "palette.png")
    Image.fromarray(alpha).save(folder / "alpha.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg", quality=98)
    Image.fromarray((grey.astype(np.uint16) * 16)).save(folder / "twelve.png")
    Image.fromarray((grey.astype(np.uint16) * 257)).save(folder / "sixteen.tif")
    Image.fromarray(grey.astype(np.float32) / 255).save(folder / "float.tif")
    Image.fromarray(np.rot90(grey, 1)).save(folder / "rotated.jpg", exif=exif, quality=98)
    Image.fromarray(grey).save(folder / "wrong-extension.jpg", format="PNG")
    return {file.name: file for file in sorted(folder.iterdir())}


def test_every_kind_of_file_gives_the_same_picture(tmp_path):
    for name, file in variant_files(tmp_path).items():
        image_u8 = np.asarray(images.open_image(file, "L")).astype(int)
        assert image_u8.shape == (30, 40), name
        assert abs(image_u8 - ramp()).max() <= 6, name


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_a_damaged_file_is_named_with_the_reason(tmp_path, content):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(
        tmp_path / "bad.png"
    )
    data = (tmp_path / "bad.png").read_bytes()[:2000] if content == "truncated" else content
    (tmp_path / "bad.png").write_bytes(data)
    with pytest.raises(ValueError, match="bad.png.*(damaged|not an image)"):
        images.load_images(pd.DataFrame({"path": ["bad.png"]}), tmp_path, 16)
    with pytest.raises(FileNotFoundError, match="gone.png"):
        images.load_images(pd.DataFrame({"path": ["gone.png"]}), tmp_path, 16)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    frame = save_ramps(tmp_path, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match="0.png: more than"):
        images.load_images(frame, tmp_path, 16)


def test_masks_are_binary_follow_the_images_and_must_exist(tmp_path):
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :14] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    frame = pd.DataFrame({"path": ["a", "b"], "mask_path": ["mask.png", "mask.png"]})
    masks = images.load_masks(frame, tmp_path, 16)
    assert masks.dtype == bool and masks.shape == (2, 16, 16)
    assert masks[0].sum() == 16 * 7
    with pytest.raises(ValueError, match="no mask, first b"):
        images.load_masks(frame.assign(mask_path=["mask.png", ""]), tmp_path, 16)
