"""An estimate of the energy that a stretch of work took; `codecarbon` does the measuring."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import UserError


@contextmanager
def measured_energy(is_wanted: bool) -> Iterator[dict[str, Any]]:
    """Estimate the energy of what runs inside, on this machine, without asking the network for anything.

    Where processor or accelerator have no meter that may be read, `codecarbon` goes by their load and rated power.

    Args:
        is_wanted: False measures nothing.

    Yields:
        dict[str, Any]: Holds `kwh` and `by` once the work is over; stays empty where nothing was measured.

    Raises:
        UserError: If `codecarbon` is wanted and not installed.
    """
    found: dict[str, Any] = {}
    if not is_wanted:
        yield found
        return
    try:
        import codecarbon
    except ImportError as error:
        raise UserError("--measure_energy expects codecarbon: run pip install 'ragcun_hf[energy]'") from error
    # The country matters for carbon dioxide only, which is not asked for here.
    tracker = codecarbon.OfflineEmissionsTracker(
        country_iso_code="USA",
        measure_power_secs=5,
        save_to_file=False,
        allow_multiple_runs=True,
        log_level="critical",
    )
    tracker.start()
    try:
        yield found
    finally:
        tracker.stop()
    energy = tracker.final_emissions_data.energy_consumed
    found |= {"kwh": float(f"{energy:.3g}"), "by": f"codecarbon {codecarbon.__version__}"}
