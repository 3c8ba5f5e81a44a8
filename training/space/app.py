"""Run the search page (`ragcun search`) as a Hugging Face Space, with settings from the Space's variables."""

import os

from ragcun_hf.cli.search_demo import main as serve_page
from ragcun_hf.command_line import run_script
from ragcun_hf.errors import UserError

_FLAGS = {
    "MODEL_ID": "--model_path",
    "MODEL_REVISION": "--revision",
    "CORPUS": "--corpus",
    "TEXT_COLUMN": "--text_column",
    "TITLE_COLUMN": "--title_column",
    "QUERIES": "--queries",
    "LIMIT": "--limit",
}


def main() -> None:
    """Convert the variables to flags, and serve the page on the host and port that a Space expects."""
    for name in ("MODEL_ID", "CORPUS"):
        if not os.environ.get(name):
            raise UserError(
                f"expected the variable {name}, got none: set it in the Space's Settings, Variables and secrets"
            )
    flags = [f"{flag}={os.environ[name]}" for name, flag in _FLAGS.items() if os.environ.get(name)]
    serve_page([*flags, "--host", "0.0.0.0", "--port", os.environ.get("PORT", "7860")])


if __name__ == "__main__":
    run_script(main)
