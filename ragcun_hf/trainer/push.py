"""`--push_to_hub` in training: the token is tried before, the whole folder goes in one commit after it."""

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
    """Where a run goes once it is saved."""

    api: HfApi
    repo_id: str
    revision: str | None

    def send(self, folder: Path) -> None:
        """Write a card that says what was trained and that nothing was evaluated yet, check, and send.

        Args:
            folder: Of the saved run.

        Raises:
            UserError: If the Hub refuses or the connection breaks; the folder stays, and can be sent later.
        """
        from ..evaluation.plots import plot_learning_curves
        from ..publishing.card_sources import keep_sources
        from ..publishing.hub_upload import upload
        from ..publishing.model_card import nothing_measured, read_json_object, render_card, write_card
        from ..publishing.upload_plan import check_before_upload, describe_plan, plan_upload

        record = read_json_object(folder / RECORD_FILE)
        name, config = self.repo_id.split("/")[-1], read_json_object(folder / "config.json")
        plot = folder / "learning_curves.png"
        plot_learning_curves(record["log_history"], plot)
        plots = {"The terms of the loss while training": plot.name} if plot.is_file() else {}
        results = nothing_measured(name, config)
        text = render_card(results=results, training_record=record, repo_id=self.repo_id, plots=plots)
        write_card(folder / "README.md", text)
        keep_sources(folder, repo_id=self.repo_id)
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
    """Take `--push_to_hub` from the Trainer, which would send checkpoints and a card of its own, and try the token.

    Args:
        training_args: As given; the Trainer gets a copy in which `push_to_hub` is switched off.

    Returns:
        The push, on the main process; None elsewhere, or where none was asked for.

    Raises:
        UserError: If the Hub would not take the model.
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

    from ..publishing.hub_upload import prepare_repository

    wanted = training_args.hub_model_id or Path(str(training_args.output_dir)).resolve().name
    api, revision = HfApi(token=training_args.hub_token), training_args.hub_revision
    repo_id = prepare_repository(api, wanted, private=training_args.hub_private_repo, revision=revision)
    return PlannedPush(api, repo_id, revision)
