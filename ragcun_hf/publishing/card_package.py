"""Tell a model card about this package: its name, what a model folder needs to load, and how to cite it.

Everything comes from the metadata of the installed package, whose home is setup.cfg.
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

from ..errors import UserError

PACKAGE = "ragcun_hf"
PLAIN_NEEDS = "sentence-transformers>=3"  # of a plain folder; tests load one in the oldest and in the newest version

# The code in a model folder imports these; everything else comes with transformers.
_NEEDED = ("torch", "transformers")
_REQUIREMENT = re.compile(r"([\w.-]+)\s*([^;\s]*)")
# The paper of the isotropy term, as in CITATION.cff, which no installed package has.
_PAPER = """\
@misc{balestriero2025lejepa,
  title = {{LeJEPA}: Provable and Scalable Self-Supervised Learning Without the Heuristics},
  author = {Balestriero, Randall and LeCun, Yann},
  year = {2025},
  eprint = {2511.08544},
  archivePrefix = {arXiv}
}"""


def package_facts(version: str | None) -> dict[str, Any]:
    """Return name, summary, license, needed packages with their lowest versions, and citations.

    `version` is that of the package with which the model was measured; None leaves it out of the citation.
    """
    metadata = _metadata()
    needs = {name: requirement(name) for name in (*_NEEDED, "sentence-transformers", "faiss-cpu")}
    return {
        "name": PACKAGE,
        "summary": metadata["Summary"],
        "license": metadata["License-Expression"],
        "needs": needs,
        "install": " ".join(f'"{needs[name]}"' for name in _NEEDED),
        "plain_needs": PLAIN_NEEDS,
        "citations": [_citation(metadata, version), _PAPER],
    }


def requirement(name: str) -> str:
    """Return how this package, or an extra of it, requires another one, such as `transformers>=5.20`."""
    for line in _metadata().get_all("Requires-Dist") or []:
        found = _REQUIREMENT.match(line)
        if found and found[1] == name:
            return f"{found[1]}{found[2]}"
    raise UserError(
        f"expected the installed {PACKAGE} to require {name}, got no such requirement: install the package again"
    )


def _metadata() -> Any:
    try:
        return importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"expected the installed package {PACKAGE}, whose metadata name the versions that a model needs, found "
            "none: run pip install -e . in the checkout"
        ) from error


def _citation(metadata: Any, version: str | None) -> str:
    fields = {
        "title": f"{metadata['Name']}: {metadata['Summary']}".replace("_", r"\_"),
        "author": f"{{{metadata['Author']}}}".replace("_", r"\_"),  # one name, not a first and a last one
        **({"version": version} if version else {}),
    }
    lines = ",\n".join(f"  {key} = {{{value}}}" for key, value in fields.items())
    return f"@software{{{metadata['Name']},\n{lines}\n}}"
