"""The four published recipes parse as in the training command, with the published numbers."""

from pathlib import Path

import pytest

from ragcun_hf.cli.train_contrastive import PairDataArguments
from ragcun_hf.cli.training import parse_training_arguments
from ragcun_hf.errors import UserError
from ragcun_hf.model.base_models import DEFAULT_BASE_MODEL

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "ragcun_hf" / "cli" / "recipes"

# name: (contrastive, isotropy, predictive), predictor, width, epochs, learning rate
PUBLISHED = {
    "jepa_10k": ((1.0, 1.5, 1.2), True, 768, 2, 5e-4),
    "512dim_10k": ((0.1, 1.0, 1.0), True, 512, 1, 5e-4),
    "jepa_iso15_pred12": ((0.0, 1.5, 1.2), True, 768, 3, 5e-4),
    "pure_isotropy": ((0.0, 1.0, 0.0), False, 512, 1, 1e-3),
}


def _parse(path, *flags):
    arguments = ["--config", str(path), "--output_dir", "out", "--use_cpu", *flags]
    (parsed,) = parse_training_arguments(PairDataArguments, description="", arguments=arguments, defaults={})
    return parsed


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_has_the_published_settings(name):
    parsed = _parse(RECIPES / f"{name}.yaml")
    model, training = parsed.model, parsed.training
    weights, use_predictor, width, epochs, learning_rate = PUBLISHED[name]
    assert (training.lambda_contrastive, training.lambda_isotropy, training.lambda_predictive) == weights
    assert (model.use_predictor, model.output_dim) == (use_predictor, width)
    assert (training.num_train_epochs, training.learning_rate) == (epochs, learning_rate)
    assert (training.per_device_train_batch_size, training.warmup_steps, training.weight_decay) == (16, 100, 0.01)
    assert (training.isotropy_kind, training.predictive_kind) == ("covariance", "mse")
    assert (model.base_model, model.freeze_base) == (DEFAULT_BASE_MODEL, True)
    assert (model.projection_init, model.similarity_fn_name) == ("random", "euclidean")
    assert parsed.data.train_data == []  # left to the user


@pytest.mark.parametrize("name", ["jepa_10k", "512dim_10k", "jepa_iso15_pred12"])
def test_recipes_with_pairs_use_the_original_contrastive_term(name):
    training = _parse(RECIPES / f"{name}.yaml").training
    assert (training.contrastive_kind, training.margin) == ("triplet", 0.1)


def test_there_are_no_other_recipes_under_published_names():
    assert PUBLISHED.keys() <= {path.stem for path in RECIPES.glob("*.yaml")}


@pytest.mark.parametrize(
    "path", [path for path in sorted(RECIPES.glob("*.yaml")) if path.stem != "unlabelled"], ids=lambda path: path.stem
)
def test_every_recipe_parses(path):
    _parse(path)


def test_flags_win_over_the_recipe():
    parsed = _parse(RECIPES / "jepa_10k.yaml", "--projection_init", "identity")
    assert parsed.model.projection_init == "identity"


def test_an_unknown_key_is_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        (RECIPES / "jepa_10k.yaml").read_text(encoding="utf-8") + "lambda_isotrpy: 1.5\n", encoding="utf-8"
    )
    with pytest.raises(UserError, match="unknown key 'lambda_isotrpy'"):
        _parse(path)
