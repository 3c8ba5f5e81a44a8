"""Send a trained model to the Hub: weights, code, tokenizer, card, results and plots, in one commit.

    python training/push_to_hub.py --model_path checkpoints/mine --repo_id your-name/mine --dry_run

Before anything is sent, the card must equal what its sources (training/render_card.py) are rendered to, except for
your own words between its marker lines; the results must belong to the weights; and a process that has only
transformers must be able to load the folder. --dry_run stops after these checks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..command_line import argument, parse_arguments, say
from ..errors import UserError
from ..publishing.hub import check_before_upload, describe_plan, plan_upload, prepare_repository, upload


@dataclass
class PushArguments:
    """The model to send, and the repository that gets it."""

    model_path: str | None = argument(None, "Folder of the trained model, with its card.")
    repo_id: str | None = argument(None, "Id on the Hub, organisation/name or user/name; created if it is missing.")
    private: bool = argument(False, "Make a new repository private; an existing one stays as it is.")
    revision: str | None = argument(None, "Branch to commit to, created if it is missing. Default: main.")
    dry_run: bool = argument(False, "Check everything and print what would be sent, without contacting the Hub.")


def main(arguments: list[str] | None = None) -> None:
    """Check the folder, print what would be sent, send it, and print how to load it."""
    (args,) = parse_arguments([PushArguments], description=__doc__ or "", arguments=arguments)
    if not args.model_path:
        raise UserError("--model_path expects the folder of a trained model, got none: name it")
    if not args.repo_id or args.repo_id.count("/") != 1:
        raise UserError(f"--repo_id expects organisation/name, got {args.repo_id!r}: name both parts")
    from huggingface_hub import HfApi

    folder, repo_id = Path(args.model_path), args.repo_id
    plan = plan_upload(folder)
    say(describe_plan(plan, repo_id, revision=args.revision))
    check_before_upload(folder, repo_id)
    say("Checked: the card against its sources, its figures against the weights, and loading in a clean process.")
    if args.dry_run:
        say("Nothing was sent (--dry_run).")
        return
    api = HfApi()
    # None: the owner's settings decide, as everywhere in the Hub's tools.
    prepare_repository(api, repo_id, private=args.private or None, revision=args.revision)
    commit = upload(api, plan, repo_id, revision=args.revision)
    say(f"Sent: {commit.commit_url}")
    say(f'Load it: AutoModel.from_pretrained("{repo_id}", revision="{commit.oid}", trust_remote_code=True)')
