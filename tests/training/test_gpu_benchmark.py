"""The benchmark for cards runs on a processor in a small version, and says in one line that there is no card."""

import json

import pytest
import torch
from pretend_card import pretend_card

from ragcun_hf.data.writing import write_beir_folder
from ragcun_hf.errors import UserError


@pytest.mark.slow
def test_the_small_version_times_every_part_on_a_processor(tmp_path, embedded_folder, capsys):
    pytest.importorskip("sentence_transformers")
    import gpu

    pairs = {f"q{row}": {f"d{row}": 1} for row in range(3)}
    texts = {"d0": "this is about bread", "d1": "this is about rain", "d2": "this is about fish"}
    queries = {"q0": "what is bread", "q1": "when does rain come", "q2": "how do fish sleep"}
    write_beir_folder(tmp_path / "toy", {name: ("", text) for name, text in texts.items()}, queries, {"test": pairs})
    parts = [part for part in gpu.PARTS if part != "processes"]  # tests/cli/test_accelerate.py has two processes
    flags = ["--parts", *parts, "--data_dir", str(tmp_path / "toy"), "--output_dir", str(tmp_path)]
    gpu.main(["--device", "cpu", "--quick", "--threads", "1", "--minutes", "0", *flags])
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert set(content["details"]["seconds"]) == {"MiniLM-L6", "search", "head training", "sweep", "encoder training"}
    assert set(content["details"]["seconds"]["MiniLM-L6"]) == {
        "tokenizing alone",
        "bare encoder",
        "ours, first run",
        "ours, second run",
        "ours, bfloat16",
        "sentence-transformers, float32",
        "sentence-transformers, bfloat16, batches of 32",
    }
    claims = {claim["claim"]: claim["value"] for claim in content["claims"]}
    assert claims["share of its results among ours"] > 0.99
    assert claims["its NDCG@10"] > 0.5  # most first words of a passage find it
    assert claims["NDCG@10 on toy, on the processor in float32"] == 1
    assert claims["its difference to NDCG@10 on the device, auto"] == 0
    assert "MiniLM-L6, ours, first run: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MiniLM-L6", "MPNet-base"])
def test_a_machine_without_the_embedded_model_gets_random_weights_and_a_tokenizer(tmp_path, monkeypatch, name):
    pytest.importorskip("sentence_transformers")
    import gpu

    from ragcun_hf import IsotropicGaussianModel
    from ragcun_hf.model import embedded_isotropic_gaussian

    def refuse():
        raise ImportError("not installed")

    monkeypatch.setattr(embedded_isotropic_gaussian, "embedded_model_folder", refuse)
    monkeypatch.setitem(gpu.SHAPES, name, (gpu.SHAPES[name][0], 24, 2))
    model = IsotropicGaussianModel.from_encoder(gpu.encoder_folder(name, tmp_path / name))
    text = " ".join(gpu._WORDS[:5])
    assert len(model.tokenizer(text)["input_ids"]) == 7
    assert model.encode([text, "unheard"]).shape == (2, 24)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_card_the_script_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    import gpu

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.main(["--output_dir", str(tmp_path)])
    assert capsys.readouterr().out.strip().startswith("No CUDA device here")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [
        ("cpu", None, ("cpu", None)),
        ("cuda", None, ("cuda", "0")),
        ("cuda:1", None, ("cuda", "1")),
        ("cuda:1", "GPU-3,GPU-5", ("cuda", "GPU-5")),
        ("cuda:2", "3,5", ("cuda", "")),
        ("cuda", "", ("cuda", "")),
    ],
)
def test_the_script_sees_one_card_of_several(monkeypatch, device, seen, expected):
    import gpu

    monkeypatch.setattr(gpu.os, "environ", {} if seen is None else {"CUDA_VISIBLE_DEVICES": seen})
    assert (gpu.see_one_card(device), gpu.os.environ.get("CUDA_VISIBLE_DEVICES")) == expected


def test_a_part_that_fails_does_not_cost_the_others(tmp_path, monkeypatch, capsys):
    import gpu

    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(gpu, "searching", fail)
    monkeypatch.setattr(gpu, "quality", lambda *_: [gpu.figure("quality", 1.0, "")])
    flags = ["--device", "cpu", "--quick", "--parts", "search", "quality", "--data_dir", str(tmp_path)]
    with pytest.raises(UserError, match="RuntimeError in search: run --parts search"):
        gpu.main([*flags, "--threads", "1", "--output_dir", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [claim["claim"] for claim in content["claims"]] == ["quality"]
    assert "no compiler" in capsys.readouterr().err


def test_no_further_part_starts_after_the_minutes_given(tmp_path, monkeypatch, capsys):
    import gpu

    for name in ("searching", "quality", "two_processes"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name: [gpu.figure(name, 1.0, "")])
    flags = ["--device", "cpu", "--quick", "--parts", "search", "quality", "processes", "--data_dir", str(tmp_path)]
    gpu.main([*flags, "--minutes", "1e-9", "--threads", "1", "--output_dir", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert [claim["claim"] for claim in content["claims"]] == ["searching"]
    assert content["details"]["left"] == ["quality", "processes"]
    assert "run --parts quality processes" in capsys.readouterr().out
    gpu.main([*flags, "--minutes", "0", "--threads", "1", "--output_dir", str(tmp_path)])
    assert len(json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["claims"]) == 3


@pytest.mark.slow
def test_the_small_version_runs_on_a_pretend_card(tmp_path, monkeypatch, embedded_folder, capsys):
    import gpu

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pretend_card():
        gpu.main(["--quick", "--threads", "1", "--parts", "search", "head", "--output_dir", str(tmp_path)])
    content = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert content["details"]["device"] == "a pretend card"
    assert {claim["claim"]: claim["value"] for claim in content["claims"]}["share of its results among ours"] > 0.99
