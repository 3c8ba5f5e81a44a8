"""Try many settings of the head on the same cached features, and report the best.

    python training/sweep.py --recipe quick --train_data pairs.jsonl --base_model embedded

Training flags that define a head apply to all heads; --grid lists what changes. Settings are compared
by NDCG@10 on held-out documents, never on a test set. With successive halving, the better settings train longer. When
it is called again, an interrupted sweep continues.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..command_line import argument, config_file, parse_yaml, quiet_libraries, say
from ..commands import command
from ..errors import UserError
from ..evaluation.environment import measurement_facts
from ..evaluation.results import MAIN_METRIC, write_json
from ..files import check_writable, disk_errors_explained, encoder_name, owned_folder, write_whole
from .train_contrastive import PairDataArguments, read_data
from .training import parse_training_arguments, with_corpus

if TYPE_CHECKING:
    from ..sweep.records import SweepRecords
    from ..sweep.settings import Setting, Trial
    from .training import ParsedArguments


@dataclass
class SweepArguments:
    """The settings to try, and their comparison."""

    grid: str = argument("{}", "Flags and the values to try, in YAML or JSON; for random search also ranges.")
    search: Literal["grid", "random"] = argument("grid", "grid: every combination; random: --num_settings draws.")
    num_settings: int = argument(24, "With --search random: number of settings to draw.")
    seeds: list[int] = argument([42], "Train each setting with each of these seeds. They do not change the split.")
    halving: int = argument(4, "k: each round keeps 1/k of the settings, trained k times as long; 1: one round.")
    select: Literal["ndcg@10", "ndcg@10_predictor"] = argument(MAIN_METRIC, "The validation figure that decides.")


def main(arguments: list[str] | None = None) -> None:
    """Train all heads and report."""
    sweep, parsed = parse(arguments)
    quiet_libraries()
    settings, trials = make_trials(sweep, parsed)
    with owned_folder(Path(str(parsed.training.output_dir))):
        _run(sweep, parsed, settings, trials, arguments)


def _run(
    sweep: SweepArguments,
    parsed: ParsedArguments,
    settings: list[Setting],
    trials: list[Trial],
    arguments: list[str] | None,
) -> None:
    from ..data.training_rows import rows_digest
    from ..objective.lexical import prepare_lexical_half
    from ..sweep.heads import HeadData
    from ..sweep.records import SweepRecords, remove_sweep
    from ..sweep.run import run_rounds
    from ..trainer.record import recorded_arguments

    read = with_corpus(read_data(parsed), parsed)
    base = parsed.model.build()
    fields, is_wanted = parsed.model.config_fields(), parsed.training.lexical
    lexical = prepare_lexical_half(base, read.known_documents, is_wanted=is_wanted, fields=fields)
    base.to(parsed.training.device)  # type: ignore[arg-type]  # transformers wraps Module.to without its types
    store = parsed.training.store(base)
    data = HeadData.of_rows(base, read.train, store, held_out=read.validation, corpus=read.corpus)
    say(store.summary())
    digests = {"training_texts": rows_digest(read.train), "held_out": rows_digest(read.validation)}  # type: ignore[arg-type]  # make_trials refuses a sweep without held-out rows
    spec = {
        "data": {
            **read.facts,
            **lexical,
            **digests,
            **({"documents_searched": len(read.corpus)} if read.corpus else {}),
        },
        "features": parsed.training.value_flags(),
        "model": {**asdict(parsed.model), "base_model": encoder_name(parsed.model.base_model)},
        "training": recorded_arguments(parsed.training),
        "settings": settings,
        "seeds": sweep.seeds,
        "halving": sweep.halving,
        "select": sweep.select,
    }
    folder = Path(str(parsed.training.output_dir))
    with disk_errors_explained(folder):
        if parsed.run.overwrite:
            remove_sweep(folder)
        records = SweepRecords(folder, spec)
        say(f"{len(settings)} settings, {len(sweep.seeds)} seeds; {len(data.pairs):,} pairs, a part of them held out")
        run_rounds(data, settings, trials, records, factor=sweep.halving, select=sweep.select)
        _report(folder, parsed, spec, records, data.base_figures(), arguments)


def parse(arguments: list[str] | None = None) -> tuple[SweepArguments, ParsedArguments]:
    """Read the command line."""
    name = Path(config_file(arguments) or "sweep").stem
    sweep, parsed = parse_training_arguments(
        SweepArguments,
        PairDataArguments,
        description=__doc__ or "",
        arguments=arguments,
        defaults={"output_dir": f"sweeps/{name}", "val_fraction": 0.2},
    )
    from ..objective.arguments import with_values

    if parsed.validation.val_data:  # replaces the fraction, which has a default here
        parsed = replace(parsed, training=with_values(parsed.training, val_fraction=0.0))
    return sweep, parsed


def make_trials(sweep: SweepArguments, parsed: ParsedArguments) -> tuple[list[Setting], list[Trial]]:
    """Return all settings and a trial for each of them and each seed; refuse what a sweep cannot do."""
    from ..sweep.settings import make_trial, trainer_only_flags

    training = parsed.training
    settings = _settings(sweep, training.seed)
    if not sweep.seeds or len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"--seeds expects one or more different seeds, got {sweep.seeds}: list each once")
    if sweep.halving < 1:
        raise UserError(f"--halving must be at least 1, got {sweep.halving}: set it to 1 for none, or to e.g. 4")
    if not (parsed.model.freeze_base and training.feature_cache):
        raise UserError(
            "a sweep trains heads on cached features of a frozen encoder: leave --no_freeze_base and "
            "--no_feature_cache out"
        )
    if training.world_size != 1:
        raise UserError(f"a sweep runs in one process, got {training.world_size}: start it without accelerate launch")
    others = {"streaming": parsed.data.streaming, "blend": training.blend != 1, "show_plan": parsed.run.show_plan}
    refused = [*trainer_only_flags(training), *(name for name, is_given in others.items() if is_given)]
    if refused:
        raise UserError(f"a sweep does not support --{refused[0]}: leave the flag out")
    if not parsed.validation.val_data and not training.val_fraction:
        raise UserError("a sweep needs held-out pairs to judge by, got none: set --val_fraction or --val_data")
    check_writable(str(training.output_dir))
    trials = [make_trial(setting, seed, parsed.model, training) for setting in settings for seed in sweep.seeds]
    if sweep.select.endswith("predictor") and not any(trial.model.use_predictor for trial in trials):
        raise UserError(f"--select {sweep.select} needs heads with a predictor, got none: add --use_predictor")
    return settings, trials


def _settings(sweep: SweepArguments, seed: int) -> list[Setting]:
    from ..sweep.settings import grid_settings, random_settings

    try:
        grid = parse_yaml(sweep.grid)
    except ValueError as error:
        raise UserError(f"--grid expects YAML or JSON, got {sweep.grid!r} ({error}): correct it") from error
    if not isinstance(grid, dict):
        raise UserError(f"--grid expects a mapping of flags to lists of values, got {sweep.grid!r}: correct it")
    is_random = sweep.search == "random"
    return random_settings(grid, sweep.num_settings, seed=seed) if is_random else grid_settings(grid)


def _report(
    folder: Path,
    parsed: ParsedArguments,
    spec: dict[str, Any],
    records: SweepRecords,
    base: dict[str, float],
    arguments: list[str] | None,
) -> None:
    """Write table, plot, results and the flags of the best setting, and print what was written."""
    from ..sweep.report import format_settings, plot_sweep, varied_names

    select = spec["select"]
    summaries = records.summaries(select)
    table = format_settings(summaries, base, select)
    write_whole(folder / "table.md", table + "\n")
    results = {
        **measurement_facts("sweep", arguments),
        "spec": spec,
        "base": base,
        "settings": [asdict(summary) for summary in summaries],
        "seconds_of_heads": round(records.total_seconds(), 2),
    }
    write_json(folder / "results.json", results)
    best = summaries[0]
    if select not in best.means:
        raise UserError(f"expected heads with finite figures, got none (see {folder}/table.md): lower --learning_rate")
    _write_best(folder, parsed, best.setting)
    written = ["table.md", "results.json", "best.yaml"]
    if varied_names([summary.setting for summary in summaries]):
        plot_sweep(summaries, base, select, folder / "settings.png")
        written.append("settings.png")
    say(f"\n{table}\n\nIn {folder}: {', '.join(written)}.")
    if not best.means[select] > base[select if select in base else MAIN_METRIC]:
        say("No setting beats the frozen base on the held-out documents.")
    say(f"Next: {command('train_contrastive', '--config', folder / 'best.yaml')}")


def _write_best(folder: Path, parsed: ParsedArguments, setting: Setting) -> None:
    """Write the flags that train the best setting with the command for pairs."""
    import yaml

    from ..sweep.settings import make_trial
    from ..trainer.record import recorded_arguments

    # The shared seed, so that the same documents are held out.
    trial = make_trial(setting, parsed.training.seed, parsed.model, parsed.training)
    flags = {}
    for part in (parsed.data, parsed.validation, trial.model):
        for field in fields(part):
            default = field.default_factory() if callable(field.default_factory) else field.default
            if getattr(part, field.name) != default:
                flags[field.name] = getattr(part, field.name)
    flags |= {name: value for name, value in recorded_arguments(trial.training).items() if value is not None}
    if flags.get("per_device_eval_batch_size") == flags["per_device_train_batch_size"]:
        del flags["per_device_eval_batch_size"]
    flags["output_dir"] = f"checkpoints/{folder.resolve().name}"
    write_whole(folder / "best.yaml", yaml.safe_dump(flags, sort_keys=False, allow_unicode=True))
