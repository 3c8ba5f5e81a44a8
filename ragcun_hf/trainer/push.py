"""The card of a trained model, and its upload: the token is tested before a run, the folder sent in one commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..command_line import say
from ..commands import command
from ..errors import UserError
from ..files import RECORD_FILE

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

    from ..objective.arguments import IsotropicGaussianTrainingArguments


@dataclass(frozen=True)
class PlannedPush:
    """Where a model is sent once it is saved."""

    api: HfApi
    repo_id: str
    revision: str | None
    training_digests: bool = True

    def send(self, folder: Path, commit_message: str | None = None) -> CommitInfo:
        """Check a folder, which has its card, and send it.

        If the Hub refuses it or the connection breaks, a UserError says how to send the folder later.
        """
        from ..publishing.hub import check_before_upload, describe_plan, plan_upload, upload

        plan = plan_upload(folder, training_digests=self.training_digests)
        say(describe_plan(plan, self.repo_id, revision=self.revision))
        try:
            check_before_upload(folder, self.repo_id)
            commit = upload(self.api, plan, self.repo_id, revision=self.revision, commit_message=commit_message)
        except UserError as error:
            raise UserError(
                f"{error}. The model is saved in {folder}: send it later with "
                f"{command('push_to_hub', '--model_path', folder, '--repo_id', self.repo_id)}"
            ) from error
        say(f"Sent: {commit.commit_url}")
        return commit


def write_training_card(
    folder: Path, repo_id: str | None, *, license_id: str | None = None, language: str | Sequence[str] | None = None
) -> None:
    """Write the card of a model that is saved in a folder; it says that nothing was evaluated yet."""
    from ..evaluation.results import read_json_object, read_record
    from ..publishing.card import write_card
    from ..publishing.card_plots import draw_learning_curves
    from ..publishing.card_sources import keep_sources, nothing_measured

    record = read_record(folder / RECORD_FILE)
    plots = draw_learning_curves(record, folder / "README.md")
    name = (repo_id or folder.resolve().name).split("/")[-1]
    results = nothing_measured(name, read_json_object(folder / "config.json"))
    languages = [language] if isinstance(language, str) else list(language or ())
    sources: dict[str, Any] = {"repo_id": repo_id, "plots": plots, "license_id": license_id, "languages": languages}
    write_card(folder / "README.md", results=results, training_record=record, **sources)
    keep_sources(folder, training_record=folder / RECORD_FILE, **sources)


def plan_push(
    args: IsotropicGaussianTrainingArguments,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
) -> PlannedPush:
    """Create the repository of a run, or raise a UserError if the Hub would not take the model.

    The Trainer of transformers must not push: it would send checkpoints and its own card.
    """
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    if strategy not in ("every_save", "end"):
        raise UserError(
            f"--push_to_hub sends the finished model, in one commit, got --hub_strategy {strategy}: leave it out"
        )
    from huggingface_hub import HfApi

    from ..publishing.hub import prepare_repository

    wanted = args.hub_model_id or Path(str(args.output_dir)).resolve().name
    api, revision = HfApi(token=token or args.hub_token), revision or args.hub_revision
    is_private = args.hub_private_repo if private is None else private
    repo_id = prepare_repository(api, wanted, private=is_private, revision=revision)
    return PlannedPush(api, repo_id, revision, args.hub_training_digests)
