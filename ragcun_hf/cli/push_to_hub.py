"""Send a trained model to the Hub: weights, code, tokenizer, card, results and plots, in one commit.

    python training/push_to_hub.py --model_path checkpoints/mine --repo_id your-name/mine --dry_run

Before anything is sent, the card must equal what its sources (training/render_card.py) are rendered to, except for
your own words between its marker lines; the results must belong to the weights; and a process that has only
transformers must be able to load the folder. Its code must be the installed package's. --dry_run stops after these
checks. Sent are the files that a model consists of, and what its card shows; all others stay.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..command_line import argument, parse_arguments, quiet_libraries, say
from ..errors import UserError
from ..files import disk_errors_explained
from ..publishing.hub import (
    UploadPlan,
    check_before_upload,
    check_clean_load,
    describe_plan,
    plan_plain_upload,
    plan_upload,
    prepare_repository,
    upload,
)


@dataclass
class PushArguments:
    """The model to send, and the repository that gets it."""

    model_path: str | None = argument(None, "Folder of the trained model, with its card.")
    repo_id: str | None = argument(None, "Id on the Hub, organisation/name or user/name; created if it is missing.")
    private: bool = argument(False, "Make a new repository private; an existing one stays as it is.")
    revision: str | None = argument(None, "Branch to commit to, created if it is missing. Default: main.")
    plain: bool = argument(
        False,
        "Send a plain sentence-transformers folder instead, which loads without trust_remote_code; see ragcun export.",
    )
    training_digests: bool = argument(
        True,
        "Send training_documents.txt, by which others see which of their test documents the model was trained on. "
        "Whoever has a text can find out by it whether it is among the training documents.",
    )
    trust_remote_code: bool = argument(
        False, "Send, and run in the check, code in the folder that is not the installed package's."
    )
    dry_run: bool = argument(False, "Check everything and print what would be sent, without contacting the Hub.")


def main(arguments: list[str] | None = None) -> None:
    """Check the folder, print what would be sent, send it, and print how to load it."""
    (args,) = parse_arguments([PushArguments], description=__doc__ or "", arguments=arguments)
    if not args.model_path:
        raise UserError("--model_path expects the folder of a trained model, got none: name it")
    if not args.repo_id or args.repo_id.count("/") != 1:
        raise UserError(f"--repo_id expects organisation/name, got {args.repo_id!r}: name both parts")
    with _plain_plan(args) if args.plain else _own_plan(args) as plan:
        if args.dry_run:
            say("Nothing was sent (--dry_run).")
            return
        _send(args, plan)


@contextmanager
def _own_plan(args: PushArguments) -> Iterator[UploadPlan]:
    """Yield what to send of the model's own folder, described and checked."""
    folder = Path(str(args.model_path))
    options = {"training_digests": args.training_digests, "foreign_code": args.trust_remote_code}
    plan = plan_upload(folder, **options)
    say(describe_plan(plan, str(args.repo_id), revision=args.revision))
    check_before_upload(folder, str(args.repo_id), trust_remote_code=args.trust_remote_code)
    say("Checked: the card against its sources, its figures against the weights, and loading in a clean process.")
    yield plan


@contextmanager
def _plain_plan(args: PushArguments) -> Iterator[UploadPlan]:
    """Yield what to send of a plain folder, made for this push, described and checked."""
    from .export import check_texts

    if importlib.util.find_spec("sentence_transformers") is None:
        raise UserError(
            "--plain expects the package sentence-transformers, which loads the folder before it is sent, found none: "
            "run pip install sentence-transformers"
        )
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with disk_errors_explained(folder):
            plan = plan_plain_upload(Path(str(args.model_path)), folder, str(args.repo_id), check_texts(None))
        say(describe_plan(plan, str(args.repo_id), revision=args.revision))
        check_clean_load(folder, is_plain=True)
        say("Checked: the card against its sources, its figures against the weights, and loading without remote code.")
        yield plan


def _send(args: PushArguments, plan: UploadPlan) -> None:
    from huggingface_hub import HfApi

    api, repo_id = HfApi(), str(args.repo_id)
    # None: the owner's settings decide, as everywhere in the Hub's tools.
    prepare_repository(api, repo_id, private=args.private or None, revision=args.revision)
    message = "Upload plain sentence-transformers model with its card" if args.plain else None
    commit = upload(api, plan, repo_id, revision=args.revision, commit_message=message)
    say(f"Sent: {commit.commit_url}")
    if args.plain:
        say(f'Load it: SentenceTransformer("{repo_id}", revision="{commit.oid}")')
    else:
        say(f'Load it: AutoModel.from_pretrained("{repo_id}", revision="{commit.oid}", trust_remote_code=True)')
