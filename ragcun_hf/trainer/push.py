"""`--push_to_hub` in training: test the token before the run, send the whole folder in one commit after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..command_line import say
from ..errors import UserError
from ..files import RECORD_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from .arguments import IsotropicGaussianTrainingArguments


@dataclass(frozen=True)
class PlannedPush:
    """Where a run is sent once it is saved."""

    api: HfApi
    repo_id: str
    revision: str | None

    def send(self, folder: Path) -> None:
        """Write a card, which says that nothing was evaluated yet, check the folder, and send it.

        If the Hub refuses it or the connection breaks, a UserError says how to send the folder later.
        """
        from ..evaluation.plots import plot_learning_curves
        from ..evaluation.results import read_json_object
        from ..publishing.card import write_card
        from ..publishing.card_sources import keep_sources, nothing_measured
        from ..publishing.hub import check_before_upload, describe_plan, plan_upload, upload

        record = read_json_object(folder / RECORD_FILE)
        plot = folder / "learning_curves.png"
        plot_learning_curves(record["log_history"], plot)
        plots = {"Loss terms during training": plot.name} if plot.is_file() else {}
        results = nothing_measured(self.repo_id.split("/")[-1], read_json_object(folder / "config.json"))
        card = folder / "README.md"
        write_card(card, results=results, training_record=record, repo_id=self.repo_id, plots=plots)
        keep_sources(folder, training_record=folder / RECORD_FILE, repo_id=self.repo_id, plots=plots)
        plan = plan_upload(folder)
        say(describe_plan(plan, self.repo_id, revision=self.revision))
        try:
            check_before_upload(folder, self.repo_id)
            commit = upload(self.api, plan, self.repo_id, revision=self.revision)
        except UserError as error:
            raise UserError(
                f"{error}. The model is saved in {folder}: send it later with training/push_to_hub.py"
            ) from error
        say(f"Sent: {commit.commit_url}")


def plan_push(training_args: IsotropicGaussianTrainingArguments) -> PlannedPush | None:
    """Prepare `--push_to_hub`, or raise a UserError if the Hub would not take the model.

    The Trainer itself must not push: it would send checkpoints and its own card. Returns None if no push is wanted,
    and in all processes but the main one.
    """
    if not training_args.push_to_hub:
        return None
    strategy = str(getattr(training_args.hub_strategy, "value", training_args.hub_strategy))
    if strategy not in ("every_save", "end"):
        raise UserError(
            f"--push_to_hub sends the finished model, in one commit, got --hub_strategy {strategy}: leave it out"
        )
    if training_args.process_index != 0:
        return None
    from huggingface_hub import HfApi

    from ..publishing.hub import prepare_repository

    wanted = training_args.hub_model_id or Path(str(training_args.output_dir)).resolve().name
    api, revision = HfApi(token=training_args.hub_token), training_args.hub_revision
    repo_id = prepare_repository(api, wanted, private=training_args.hub_private_repo, revision=revision)
    return PlannedPush(api, repo_id, revision)
