"""License and languages of a model card: what the user names, or the license of a base that is known to allow it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..errors import UserError

# Bases whose license, as their cards on the Hub state it, lets a model made from them have the same one.
LICENSES_OF_BASES = {
    "sentence-transformers/all-MiniLM-L6-v2": "apache-2.0",
    "sentence-transformers/all-MiniLM-L12-v2": "apache-2.0",
    "sentence-transformers/all-mpnet-base-v2": "apache-2.0",
    "BAAI/bge-small-en-v1.5": "mit",
    "BAAI/bge-base-en-v1.5": "mit",
    "BAAI/bge-large-en-v1.5": "mit",
    "intfloat/e5-small-v2": "mit",
    "intfloat/e5-base-v2": "mit",
    "intfloat/e5-large-v2": "mit",
}

# The forms of the Hub's ids: `apache-2.0`, `cc-by-nc-4.0`; `en`, `deu`, `zh-Hant`, `multilingual`.
_LICENSE = re.compile(r"[a-z0-9]+([.+-][a-z0-9]+)*\+?")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code")


def card_license(license_id: str | None, base_model: str | None) -> tuple[str | None, str]:
    """Return the license of a model and who says so, in words for the card; None if nobody does."""
    if license_id is not None:
        if not _LICENSE.fullmatch(license_id):
            raise UserError(
                f"--license expects an id of the Hub such as apache-2.0 or mit, got {license_id!r}: write it in "
                "lower case, with - for blanks (huggingface.co/docs/hub/repositories-licenses)"
            )
        return license_id, "named by whoever published it"
    known = LICENSES_OF_BASES.get(base_model or "")
    return known, "that of its base" if known else "not stated"


def check_languages(languages: Sequence[str]) -> list[str]:
    """Return codes of languages as the metadata have them, or raise a UserError that names the wrong one."""
    for language in languages:
        if not _LANGUAGE.fullmatch(language):
            raise UserError(
                f"--language expects codes such as en, de or multilingual, got {language!r}: write the ISO code"
            )
    return list(languages)
