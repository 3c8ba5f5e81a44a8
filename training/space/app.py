"""The search page as a Hugging Face Space: training/search_page, with its settings from the Space's variables."""

import os

from search_page.app import main as serve_page

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
    """Start the page with the flags that the variables stand for, where a Space expects it."""
    for name in ("MODEL_ID", "CORPUS"):
        if not os.environ.get(name):
            raise UserError(f"expected the variable {name}, got none: set it under Settings, Variables and secrets")
    flags = [f"{flag}={os.environ[name]}" for name, flag in _FLAGS.items() if os.environ.get(name)]
    serve_page([*flags, "--host", "0.0.0.0", "--port", os.environ.get("PORT", "7860")])


if __name__ == "__main__":
    run_script(main)
