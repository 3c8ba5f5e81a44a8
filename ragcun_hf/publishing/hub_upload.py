"""The Hub itself: a repository, one commit, and its errors in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UserError
from .model_card import read_json_object
from .upload_plan import UploadPlan

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

_LOG_IN = "run hf auth login, or set HF_TOKEN to a token with write access (huggingface.co/settings/tokens)"


def prepare_repository(api: HfApi, repo_id: str, *, private: bool | None = None, revision: str | None = None) -> str:
    """Make the repository and the branch where they are missing, which also tries the token.

    Args:
        api: Of the Hub, with the token.
        repo_id: organisation/name, or a name alone for the token's owner.
        private: Whether a new repository is private; None: as the owner's settings say.
        revision: Branch; None: main.

    Returns:
        The whole id, organisation/name.

    Raises:
        UserError: If the Hub refuses or cannot be reached.
    """
    with hub_errors_explained(repo_id):
        whole = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision not in (None, "main"):
            api.create_branch(whole, branch=str(revision), exist_ok=True)
    return whole


def upload(api: HfApi, plan: UploadPlan, repo_id: str, *, revision: str | None = None) -> CommitInfo:
    """Send all files in one commit: visitors see the whole model or what was there before.

    Args:
        api: Of the Hub, with the token.
        plan: As from `plan_upload`.
        repo_id: organisation/name of an existing repository.
        revision: Branch; None: main.

    Returns:
        The commit.

    Raises:
        UserError: If the Hub refuses or the connection breaks; nothing was committed then.
    """
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(name, str(path)) for name, path in plan.files.items()]
    message = f"Upload {read_json_object(plan.files['config.json']).get('model_type')} model with its card"
    with hub_errors_explained(repo_id):
        # Not upload_folder, which may spread the files over several commits.
        return api.create_commit(repo_id, operations, commit_message=message, revision=revision)


@contextmanager
def hub_errors_explained(repo_id: str) -> Iterator[None]:
    """Turn what the Hub's client raises into one line that says what to do."""
    import httpx2
    from huggingface_hub import errors

    network = (httpx2.HTTPError, ConnectionError, TimeoutError)
    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"--repo_id expects organisation/name, got {repo_id!r} ({error}): correct it") from error
    except errors.OfflineModeIsEnabled as error:
        raise UserError("expected to reach the Hub, got HF_HUB_OFFLINE in the environment: unset it") from error
    except errors.LocalTokenNotFoundError as error:
        raise UserError(f"expected a token for {repo_id}, found none: {_LOG_IN}") from error
    except errors.HfHubHTTPError as error:
        raise UserError(_refusal(error, repo_id)) from error
    except (*network, RuntimeError, OSError) as error:
        # The client wraps what broke an upload in a RuntimeError that names the file.
        cause = error if isinstance(error, network) else error.__cause__
        if isinstance(cause, errors.HfHubHTTPError):
            raise UserError(_refusal(cause, repo_id)) from error
        if not isinstance(cause, network):
            raise
        raise UserError(
            f"expected to send to {repo_id}, but the connection broke ({error}): nothing was committed, run the same "
            "command again; files that arrived are not sent twice"
        ) from error


def _refusal(error: Any, repo_id: str) -> str:
    status = getattr(error.response, "status_code", None)
    reason = " ".join(str(getattr(error, "server_message", None) or error).split())
    if status == 401:
        return f"expected a valid token for {repo_id}, got one that the Hub refuses, or none ({reason}): {_LOG_IN}"
    if status == 403:
        return (
            f"expected a token that may write to {repo_id}, got one that may not ({reason}): use a token with write "
            "access, or another organisation"
        )
    if status == 404:
        return f"expected the repository {repo_id} on the Hub, found none ({reason}): check --repo_id and --revision"
    if status in (409, 412):
        return f"{repo_id} changed on the Hub meanwhile ({reason}): run the same command again"
    return f"expected the Hub to take {repo_id}, got status {status} ({reason}): try again later"
