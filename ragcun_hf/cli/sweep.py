"""Try many settings of the head on the same cached features, and say which are worth it.

    python training/sweep.py --config training/sweeps/quick.yaml --train_data pairs.jsonl --base_model embedded

The flags of train_contrastive.py that make a head hold for every one; --grid says what changes. Settings are judged by
NDCG@10 on held-out documents, never on a test set; successive halving gives the better ones a larger budget. An
interrupted sweep goes on where it stopped when it is called again.
"""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..command_line import argument, config_file, parse_arguments, portable_command, say
from ..features.arguments import FeatureArguments
from ..model.arguments import ModelArguments
from ..trainer.arguments import ParsedArguments, RunArguments, ValidationArguments

_FEATURES = ("encoder_dtype", "encoder_backend", "feature_dtype")  # what changes a feature, beside the model


@dataclass
class SweepArguments:
    """What changes from head to head, and how settings are chosen among."""

    grid: str = argument(
        "{}", "What changes: a mapping of flags to lists of values, in YAML or JSON; random search also takes ranges."
    )
    search: Literal["grid", "random"] = argument("grid", "grid: every combination; random: --num_settings draws.")
    num_settings: int = argument(24, "With --search random: how many settings to draw.")
    seeds: list[int] = argument([42], "Each setting is trained with each seed; they do not move the validation part.")
    halving: int = argument(
        4, "Successive halving keeps one setting in so many and gives it so many times the budget; 1 trains all fully."
    )
    select: Literal["ndcg@10", "ndcg@10_predictor"] = argument(
        "ndcg@10", "The validation figure that decides: of the projection, or of the predictor's output."
    )


def main(arguments: list[str] | None = None) -> None:
    """Parse, train all heads, and report."""
    from ..command_line import quiet_libraries
    from ..trainer.arguments import IsotropicGaussianTrainingArguments
    from . import train_contrastive

    classes = [
        train_contrastive.PairDataArguments,
        ValidationArguments,
        ModelArguments,
        FeatureArguments,
        RunArguments,
    ]
    name = Path(config_file(arguments) or "sweep").stem
    sweep, *rest = parse_arguments(
        [SweepArguments, *classes, IsotropicGaussianTrainingArguments],
        description=__doc__ or "",
        arguments=arguments,
        defaults={"output_dir": f"sweeps/{name}", "val_fraction": 0.2},
    )
    parsed = ParsedArguments(*rest)
    quiet_libraries()
    settings = _settings(sweep, parsed.training.seed)
    trials = _trials(sweep, parsed, settings)
    folder = Path(str(parsed.training.output_dir))
    data, facts = _data(parsed, train_contrastive.read_views)
    _run(sweep, parsed, settings, trials, data, facts, folder, arguments)


def _settings(sweep: SweepArguments, seed: int) -> list[dict[str, Any]]:
    import yaml

    from ..errors import UserError
    from ..sweep.settings import grid_settings, random_settings

    try:
        grid = yaml.safe_load(sweep.grid)
    except yaml.YAMLError as error:
        raise UserError(f"--grid expects YAML or JSON, got {sweep.grid!r} ({error}): correct it") from error
    if not isinstance(grid, dict):
        raise UserError(f"--grid expects a mapping of flags to lists of values, got {sweep.grid!r}: correct it")
    if sweep.search == "random":
        return random_settings(grid, sweep.num_settings, seed=seed)
    return grid_settings(grid)


def _trials(sweep: SweepArguments, parsed: ParsedArguments, settings: list[dict[str, Any]]) -> list[Any]:
    """Make every trial, and refuse what a sweep cannot do before any text is encoded."""
    from ..errors import UserError
    from ..files import check_writable
    from ..sweep.settings import make_trial, trainer_only_flags

    training = parsed.training
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"--seeds expects one or more different seeds, got {sweep.seeds}: list each once")
    if sweep.halving < 1:
        raise UserError(f"--halving must be at least 1, got {sweep.halving}: set it to 1 for none, or to e.g. 4")
    if not parsed.model.freeze_base or not parsed.features.feature_cache:
        raise UserError(
            "a sweep trains heads on cached features of a frozen encoder: leave --no_freeze_base and "
            "--no_feature_cache out"
        )
    if training.world_size != 1:
        raise UserError(f"a sweep runs in one process, got {training.world_size}: start it without accelerate launch")
    refused = trainer_only_flags(training)
    given = {"streaming": parsed.data.streaming, "blend": parsed.run.blend != 1}
    refused += [name for name, is_given in given.items() if is_given]
    if refused:
        raise UserError(f"a sweep cannot do what --{refused[0]} asks for: leave the flag out")
    if not parsed.validation.val_data and not parsed.validation.val_fraction:
        raise UserError("a sweep needs held-out pairs to judge by, got none: set --val_fraction or --val_data")
    check_writable(Path(str(training.output_dir)))
    trials = [make_trial(setting, seed, parsed.model, training) for setting in settings for seed in sweep.seeds]
    if sweep.select.endswith("predictor") and not any(trial.model.use_predictor for trial in trials):
        raise UserError(f"--select {sweep.select} needs heads with a predictor, got none: add --use_predictor")
    return trials


def _data(parsed: ParsedArguments, read_views: Any) -> tuple[Any, dict[str, Any]]:
    from ..sweep.run import SweepData
    from ..trainer.inputs import views_digest

    if parsed.validation.val_data and parsed.validation.val_fraction:
        parsed.validation.val_fraction = 0.0  # the default gives way to data that were named
    train_views, validation_views, facts = read_views(parsed)
    base = parsed.model.build()
    base.to(parsed.training.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    store = parsed.features.store(base)
    data = SweepData.of_views(base, train_views, validation_views, store)
    say(store.summary())
    return data, {**facts, "training_texts": views_digest(train_views), "held_out": views_digest(validation_views)}


def _run(
    sweep: SweepArguments,
    parsed: ParsedArguments,
    settings: list[dict[str, Any]],
    trials: list[Any],
    data: Any,
    facts: dict[str, Any],
    folder: Path,
    arguments: list[str] | None,
) -> None:
    from ..files import disk_errors_explained, source_name
    from ..sweep.records import SweepRecords, remove_sweep
    from ..sweep.run import run_rounds
    from ..trainer.record import recorded_arguments

    spec = {
        "data": facts,
        "features": {name: getattr(parsed.features, name) for name in _FEATURES},
        "model": {**asdict(parsed.model), "base_model": source_name(parsed.model.base_model)},
        "training": recorded_arguments(parsed.training),
        "settings": settings,
        "seeds": sweep.seeds,
        "halving": sweep.halving,
        "select": sweep.select,
    }
    with disk_errors_explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if parsed.run.overwrite:
            remove_sweep(folder)
        records = SweepRecords(folder, spec)
        say(f"{len(settings)} settings, {len(sweep.seeds)} seeds; {len(data.pairs):,} pairs, a part of them held out")
        run_rounds(data, settings, trials, records, factor=sweep.halving, select=sweep.select)
        _report(sweep, parsed, data, spec, records, folder, portable_command("training/sweep.py", arguments))


def _report(
    sweep: SweepArguments,
    parsed: ParsedArguments,
    data: Any,
    spec: dict[str, Any],
    records: Any,
    folder: Path,
    command: str,
) -> None:
    """Write table, plot, results and the best setting's flags, and say so."""
    from ..errors import UserError
    from ..evaluation.environment import environment_facts
    from ..evaluation.results import write_json
    from ..files import write_whole
    from ..sweep.report import format_table, plot_sweep, varied_names

    base, summaries = data.base_figures(), records.summaries(sweep.select)
    table = format_table(summaries, base, sweep.select)
    write_whole(folder / "table.md", table + "\n")
    results = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **environment_facts(),
        "spec": spec,
        "base": base,
        "settings": [asdict(summary) for summary in summaries],
        "seconds_of_heads": round(records.total_seconds(), 2),
    }
    write_json(folder / "results.json", results)
    best = summaries[0]
    if sweep.select not in best.means:
        raise UserError(f"expected heads with finite figures, got none (see {folder}/table.md): lower --learning_rate")
    _write_best(folder, parsed, best.setting)
    written = ["table.md", "results.json", "best.yaml"]
    if varied_names([summary.setting for summary in summaries]):
        plot_sweep(summaries, base, sweep.select, folder / "settings.png")
        written.append("settings.png")
    say(f"\n{table}\n\nIn {folder}: {', '.join(written)}.")
    if not best.means[sweep.select] > base[sweep.select if sweep.select in base else "ndcg@10"]:
        say("No setting beats the frozen base on the held-out documents.")
    say(f"Next: python training/train_contrastive.py --config {shlex.quote(str(folder / 'best.yaml'))}")


def _write_best(folder: Path, parsed: ParsedArguments, setting: dict[str, Any]) -> None:
    """Write the flags that train_contrastive.py takes to train the best setting."""
    import yaml

    from ..files import write_whole
    from ..sweep.report import changed_fields
    from ..sweep.settings import make_trial
    from ..trainer.record import recorded_arguments

    # With the seed that parted the pairs, so that the same documents are held out.
    trial = make_trial(setting, parsed.training.seed, parsed.model, parsed.training)
    parts = (parsed.data, parsed.validation, trial.model, parsed.features)
    flags = {name: value for part in parts for name, value in changed_fields(part).items()}
    flags |= {name: value for name, value in recorded_arguments(trial.training).items() if value is not None}
    if flags.get("per_device_eval_batch_size") == flags["per_device_train_batch_size"]:
        del flags["per_device_eval_batch_size"]
    flags["output_dir"] = f"checkpoints/{folder.resolve().name}"
    write_whole(folder / "best.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
