"""Damaged files are noticed: what they hold is missing or refused in one line, or it is right.

`make test` tries some hundred damages, `make fuzz` ten thousand (FUZZ_INPUTS sets the number). The seed is fixed.
"""

import json
import os
import random
import shutil

import numpy as np
import pytest

from ragcun_hf import IsotropicGaussianModel, IsotropicGaussianTrainer, IsotropicGaussianTrainingArguments
from ragcun_hf.errors import UserError
from ragcun_hf.features.feature_cache import FeatureCache
from ragcun_hf.files import CHECKSUMS_FILE, RECORD_FILE
from ragcun_hf.model.base_models import load_trained_model
from ragcun_hf.trainer.record import open_checkpoint

pytestmark = pytest.mark.usefixtures("quick_garbage_collection")

NUM_DAMAGES = max(400, int(os.environ.get("FUZZ_INPUTS", "0")))
TEXTS = ["bread is food", "the moon is on the river", "why do fish sleep"]


def _damaged(draw, whole):
    """Flip a bit, cut, lose or repeat a piece, write zeros, or remove everything; the result differs."""
    while True:
        content, place = bytearray(whole), draw.randrange(len(whole))
        kind = draw.choice(["flip", "flip", "flip", "cut", "lost", "repeated", "zeros", "empty"])
        if kind == "flip":
            content[place] ^= 1 << draw.randrange(8)
        elif kind == "zeros":
            content[place : place + 64] = bytes(len(content[place : place + 64]))
        elif kind == "repeated":
            content[place:place] = content[max(0, place - 50) : place]
        else:
            del content[0 if kind == "empty" else place : place + draw.randrange(1, 100) if kind == "lost" else None]
        if content != whole:
            return bytes(content)


@pytest.fixture(scope="module")
def saved(tiny_encoder_folder, tiny_pairs, tmp_path_factory):
    """A trained model in its folder, with a checkpoint."""
    folder = tmp_path_factory.mktemp("saved")
    args = IsotropicGaussianTrainingArguments(
        output_dir=str(folder / "model"), use_cpu=True, max_steps=2, save_steps=2, disable_tqdm=True,
        per_device_train_batch_size=4, feature_cache_dir=str(folder / "features"), report_to="none",
    )  # fmt: skip
    model = IsotropicGaussianModel.from_encoder(str(tiny_encoder_folder))
    trainer = IsotropicGaussianTrainer(model, args, train_dataset=tiny_pairs)
    trainer.train()
    trainer.save_model()
    return folder / "model"


def _outcomes(folder, names, draw, number, load):
    """Damage one of the files, load, and restore it, again and again; return how often it was refused and right."""
    counts, wrong = {"refused": 0, "right": 0}, []
    whole = {name: (folder / name).read_bytes() for name in names}
    for count in range(number):
        name = draw.choice(names)
        (folder / name).write_bytes(_damaged(draw, whole[name]))
        try:
            load()
            counts["right"] += 1
        except UserError as error:
            counts["refused"] += 1
            if "\n" in str(error):
                wrong.append(f"{count}, {name}: {error}")
        except Exception as error:  # noqa: BLE001 (any other is a fault)
            wrong.append(f"{count}, {name}: {type(error).__name__}: {error}")
        (folder / name).write_bytes(whole[name])
    print(f"{number} damages: {counts}, {len(wrong)} wrong")  # noqa: T201 (shown by make fuzz)
    assert not wrong, "\n".join(wrong[:20])
    return counts


def test_no_damage_of_a_shard_is_read_or_ends_the_process(tmp_path):
    """The texts of a damaged file are missing, all of them, or their features are right."""
    digests = [f"{row:016d}".encode() for row in range(40)]
    features = np.random.default_rng(0).standard_normal((40, 16)).astype(np.float32)
    FeatureCache(tmp_path, {"a": 1}, feature_dim=16).write(digests, features)
    (path,) = tmp_path.rglob("*.features")
    whole, draw, number = path.read_bytes(), random.Random(0), NUM_DAMAGES * 4 // 10
    num_right = 0
    for _ in range(number):
        path.write_bytes(_damaged(draw, whole))
        cache = FeatureCache(tmp_path, {"a": 1}, feature_dim=16)
        if cache.missing(digests) != list(range(len(digests))):  # more bytes behind the last change nothing
            np.testing.assert_array_equal(cache.read(digests), features)
            num_right += 1
    assert num_right < number // 20
    print(f"{number} damages: {number - num_right} refused, {num_right} right")  # noqa: T201 (shown by make fuzz)


def test_no_damage_of_weights_or_tokenizer_is_loaded(saved):
    draw, load = random.Random(1), lambda: load_trained_model(str(saved))
    load()
    counts = _outcomes(saved, ["model.safetensors", "tokenizer.json"], draw, NUM_DAMAGES * 2 // 10, load)
    assert counts["right"] == 0


def test_damage_of_the_other_files_of_a_model_is_refused_in_one_line_or_changes_no_text_that_is_encoded(saved):
    names = sorted(path.name for path in saved.iterdir() if path.suffix in (".json", ".jsonl", ".txt"))
    names = [name for name in names if name not in ("tokenizer.json", "model.safetensors")]
    assert {"config.json", "tokenizer_config.json", "modules.json", RECORD_FILE} <= set(names)

    def load():
        assert np.isfinite(load_trained_model(str(saved)).encode(TEXTS)).all()

    _outcomes(saved, names, random.Random(2), NUM_DAMAGES * 2 // 10, load)


def test_no_damage_of_a_checkpoint_is_resumed_from(saved, tmp_path):
    folder = shutil.copytree(saved / "checkpoint-2", tmp_path / "checkpoint-2")
    assert open_checkpoint(tmp_path, "last").step == 2
    names = sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS_FILE)
    draw, load = random.Random(3), lambda: open_checkpoint(tmp_path, "last")
    assert _outcomes(folder, names, draw, NUM_DAMAGES * 2 // 10, load)["right"] == 0
    # A line that stands there twice is as good as once, and all files are whole here.
    _outcomes(folder, [CHECKSUMS_FILE], draw, NUM_DAMAGES // 100, load)


def test_a_record_without_checksums_and_one_that_is_not_there_refuse_nothing(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(bytes(weights))
    with pytest.raises(UserError, match="got another model.safetensors: it is damaged.*remove that record"):
        load_trained_model(str(folder))
    (folder / RECORD_FILE).write_text("{}", encoding="utf-8")  # of an earlier version
    load_trained_model(str(folder))
    (folder / RECORD_FILE).unlink()
    load_trained_model(str(folder))


def test_a_model_that_is_saved_again_is_not_refused_and_keeps_its_record(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "model")
    record = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    load_trained_model(str(folder)).half().save_pretrained(folder)
    load_trained_model(str(folder))
    assert json.loads((folder / RECORD_FILE).read_text(encoding="utf-8")).keys() == record.keys() - {"checksums"}
