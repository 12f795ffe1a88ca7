"""The arms: what each adds, that each adds as many, and what may never enter one."""

import pandas as pd
import pytest

from medaug.arms import ARMS, build_arm, count_added, take_fraction, weigh_classes
from medaug.dct import METHODS

LABELS = ["normal"] * 6 + ["bacterial"] * 12 + ["viral"] * 4


def make_rows(labels, origin="real", split="train", prefix="t", **columns) -> pd.DataFrame:
    ids = [f"{prefix}{i}" for i in range(len(labels))]
    return pd.DataFrame({"image_id": ids, "path": [f"{i}.png" for i in ids], "label": labels, "origin": origin,
                         "split": split, "patient_id": [f"p-{i}" for i in ids], **columns})


def make_synthetic(generator="lora", generator_seed=0, copies=2) -> pd.DataFrame:
    rows = make_rows(LABELS * copies, "synthetic", prefix=f"{generator}{generator_seed}-")
    rows = rows.assign(generator=generator, generator_seed=generator_seed, selected=[i % 2 == 0 for i in range(len(rows))])
    return rows.drop(columns=["split", "patient_id"])


TRAIN = make_rows(LABELS)
SYNTHETIC = pd.concat([make_synthetic(g, s) for g in ("untuned", "lora") for s in (0, 1)], ignore_index=True)
ORACLE = make_rows(LABELS * 2, split="oracle", prefix="o")


def build(name, ratio=1.0, **options) -> pd.DataFrame:
    return build_arm(name, TRAIN, SYNTHETIC, ORACLE, ratio, **options)


def count(rows) -> dict:
    return rows["label"].value_counts().to_dict()


@pytest.mark.parametrize("name", ["real+duplicates", "real+classical", "real+untuned", "real+synthetic", "oracle",
                                  *(f"real+{method}" for method in METHODS)])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_every_arm_that_adds_adds_as_many_of_each_class(name, ratio):
    rows = build(name, ratio)
    assert rows.iloc[:len(TRAIN)]["image_id"].tolist() == TRAIN["image_id"].tolist()
    assert count(rows.iloc[len(TRAIN):]) == count_added(TRAIN, ratio) == {
        "normal": 6 * ratio, "bacterial": 12 * ratio, "viral": 4 * ratio}
    assert (rows["weight"] == 1).all()


@pytest.mark.parametrize("name", ARMS)
def test_every_arm_is_seeded_and_has_the_columns(name):
    one, two = build(name, 0.5, seed=3), build(name, 0.5, seed=3)
    assert one.equals(two) and one.index.tolist() == list(range(len(one)))
    assert one.columns.tolist() == ["image_id", "path", "label", "origin", "weight", "augment", "view", "phase"]


def test_seeds_choose_other_images():
    chosen = {tuple(build("oracle", 0.5, seed=s)["image_id"]) for s in range(4)}
    assert len(chosen) == 4


def test_real_is_the_training_split_itself():
    assert build("real")["image_id"].tolist() == TRAIN["image_id"].tolist()


def test_duplicates_copy_each_image_equally_often():
    assert set(build("real+duplicates", 1)["image_id"].value_counts()) == {2}
    assert set(build("real+duplicates", 2)["image_id"].value_counts()) == {3}
    assert set(build("real+duplicates", 0.5)["image_id"].value_counts()) == {1, 2}


def test_classical_augments_the_copies_only():
    rows = build("real+classical")
    assert rows["augment"].tolist() == [False] * len(TRAIN) + [True] * len(TRAIN)
    assert not build("real+duplicates")["augment"].any()


@pytest.mark.parametrize("method", METHODS)
def test_dct_copies_are_views_of_real_training_images(method):
    rows = build(f"real+{method}")
    assert rows["view"].tolist() == [""] * len(TRAIN) + [method] * len(TRAIN)
    assert set(rows["image_id"]) == set(TRAIN["image_id"]) and set(rows["origin"]) == {"real"}
    assert not rows["augment"].any()


def test_selected_adds_selected_images_only():
    rows = build("real+selected", generator_seed=1)
    added = rows.iloc[len(TRAIN):]["image_id"]
    selected = SYNTHETIC.loc[SYNTHETIC["selected"], "image_id"]
    assert set(added) <= set(selected) and added.str.startswith("lora1-").all()
    assert count(rows.iloc[len(TRAIN):]) == count_added(TRAIN, 1.0)


def test_pretraining_comes_first_and_holds_synthetic_images_only():
    rows = build("synthetic->real", 0.5, generator_seed=1)
    assert rows.groupby("phase")["origin"].agg(list).map(set).to_dict() == {0: {"synthetic"}, 1: {"real"}}
    assert count(rows[rows["phase"] == 0]) == count_added(TRAIN, 0.5)
    assert rows.loc[rows["phase"] == 1, "image_id"].tolist() == TRAIN["image_id"].tolist()
    assert all((build(name)["phase"] == 0).all() for name in ARMS if name != "synthetic->real")


def test_fractions_are_nested_and_cut_no_patient():
    train = pd.concat([TRAIN, TRAIN.assign(image_id=TRAIN["image_id"] + "b")], ignore_index=True)  # two images a patient
    parts = [take_fraction(train, fraction, seed=3) for fraction in (0.25, 0.5, 0.75, 1.0)]
    patients = [set(rows["patient_id"]) for rows in parts]
    assert patients[0] < patients[1] < patients[2] < patients[3] and parts[3].equals(train)
    assert all(set(rows["patient_id"].value_counts()) == {2} for rows in parts)
    assert count(parts[0]) == {"normal": 4, "bacterial": 6, "viral": 2}  # 2, 3 and 1 patients: rounded up
    assert patients[0] != set(take_fraction(train, 0.25, seed=4)["patient_id"])


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5])
def test_a_fraction_is_more_than_nothing_and_at_most_all(fraction):
    with pytest.raises(ValueError, match="more than 0 and at most 1"):
        take_fraction(TRAIN, fraction)


def test_weighted_classes_count_equally():
    rows = build("real-weighted")
    assert rows.groupby("label")["weight"].sum().round(9).nunique() == 1
    assert weigh_classes(TRAIN["label"]).mean() == pytest.approx(1)


def test_over_and_down_sampling_balance_the_classes():
    over, down = build("real-oversampled"), build("real-downsampled")
    assert count(over) == dict.fromkeys(set(LABELS), 12) and set(over["image_id"]) == set(TRAIN["image_id"])
    assert count(down) == dict.fromkeys(set(LABELS), 4) and down["image_id"].is_unique


@pytest.mark.parametrize(("name", "generator"), [("real+untuned", "untuned"), ("real+synthetic", "lora"),
                                                 ("synthetic", "lora"), ("synthetic->real", "lora")])
def test_synthetic_rows_come_from_the_right_generator_and_seed(name, generator):
    added = build(name, generator_seed=1).query("origin == 'synthetic'")["image_id"]
    assert added.str.startswith(f"{generator}1-").all() and added.is_unique


def test_synthetic_alone_holds_nothing_real():
    assert set(build("synthetic")["origin"]) == {"synthetic"}


def test_another_generator_can_be_studied():
    rows = pd.concat([SYNTHETIC, make_synthetic("lcm")])
    added = build_arm("real+synthetic", TRAIN, rows, generator="lcm").query("origin == 'synthetic'")
    assert added["image_id"].str.startswith("lcm0-").all()


@pytest.mark.parametrize(("name", "faulty", "message"), [
    ("real+dct9", {}, "no arm 'real\\+dct9'"),
    ("real+synthetic", {"synthetic": None}, "has no synthetic images"),
    ("real+synthetic", {"generator_seed": 7}, "'lora' with seed 7; there are only lora 0, lora 1, untuned 0"),
    ("real+synthetic", {"ratio": 3.0}, "adds 36 images of class 'bacterial' and there are 24"),
    ("real+selected", {"synthetic": SYNTHETIC.drop(columns="selected")}, "needs the column 'selected'"),
    ("real+selected", {"ratio": 2.0}, r"adds 24 images of class 'bacterial' and there are 12: .*n_per_class in 03-generation"),
    ("real+synthetic", {"synthetic": SYNTHETIC.assign(origin="real")}, "origin is not 'synthetic'"),
    ("real+synthetic", {"synthetic": SYNTHETIC.assign(split="test")}, "saw the training split only"),
    ("real+synthetic", {"synthetic": SYNTHETIC.assign(source_image_id="x9")}, "outside the training split"),
    ("real+synthetic", {"synthetic": SYNTHETIC[SYNTHETIC.label != "viral"]}, "class 'viral' stands in only one"),
    ("oracle", {"oracle": None}, "which only the phantom has"),
    ("oracle", {"oracle": ORACLE.assign(split="test")}, "never of val or test"),
    ("oracle", {"oracle": ORACLE.assign(patient_id="p-t0")}, "1 oracle patient"),
    ("real", {"train": TRAIN.assign(split="val")}, "must have split 'train', found 'val'"),
    ("real", {"train": TRAIN.assign(origin="synthetic")}, "must have origin 'real'"),
    ("real", {"train": TRAIN[TRAIN.label == "viral"]}, "fewer than two classes"),
])  # fmt: skip
def test_faults_get_one_clear_line(name, faulty, message):
    given = {"train": TRAIN, "synthetic": SYNTHETIC, "oracle": ORACLE} | faulty
    with pytest.raises(ValueError, match=message) as error:
        build_arm(name, **given)
    assert "\n" not in str(error.value)
