"""Send a trained model to the Hub: weights, code, tokenizer, card, results and plots, in one commit.

    python training/push_to_hub.py --model_path checkpoints/mine --repo_id your-name/mine --dry_run

Before anything is sent, the card is checked against the files it was rendered from (training/render_card.py), the
results against the weights, and the folder is loaded by a process that has transformers only. --dry_run stops there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..command_line import argument, parse_arguments, say


@dataclass
class PushArguments:
    """What goes where."""

    model_path: str | None = argument(None, "Folder of the trained model, with its card.")
    repo_id: str | None = argument(None, "Id on the Hub, organisation/name or user/name; made if it is missing.")
    private: bool = argument(False, "Make a new repository private; an existing one keeps what it is.")
    revision: str | None = argument(None, "Branch to commit to, made if it is missing. Default: main.")
    dry_run: bool = argument(False, "Check everything and say what would be sent, without reaching for the Hub.")


def main(arguments: list[str] | None = None) -> None:
    """Parse, plan, check, say what goes, send, and say how to load it."""
    (args,) = parse_arguments([PushArguments], description=__doc__ or "", arguments=arguments)
    folder, repo_id = _folder_and_repo(args)
    from huggingface_hub import HfApi

    from ..publishing.hub_upload import prepare_repository, upload
    from ..publishing.upload_plan import check_before_upload, describe_plan, plan_upload

    plan = plan_upload(folder)
    say(describe_plan(plan, repo_id, revision=args.revision))
    check_before_upload(folder, repo_id)
    say("Checked: every figure of the card, the weights they were measured on, and loading in a clean process.")
    if args.dry_run:
        say("Nothing was sent (--dry_run).")
        return
    api = HfApi()
    # None: the owner's settings decide, as everywhere in the Hub's tools.
    prepare_repository(api, repo_id, private=args.private or None, revision=args.revision)
    commit = upload(api, plan, repo_id, revision=args.revision)
    say(f"Sent: {commit.commit_url}")
    say(f'Load it: AutoModel.from_pretrained("{repo_id}", revision="{commit.oid}", trust_remote_code=True)')


def _folder_and_repo(args: PushArguments) -> tuple[Path, str]:
    from ..errors import UserError

    if not args.model_path:
        raise UserError("--model_path expects the folder of a trained model, got none: name it")
    if not args.repo_id or args.repo_id.count("/") != 1:
        raise UserError(f"--repo_id expects organisation/name, got {args.repo_id!r}: name both parts")
    return Path(args.model_path), args.repo_id
