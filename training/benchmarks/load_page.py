"""The search page under load: the command as a process, and clients that speak to it as a browser does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from comparison import at_most
from load_trial import Trial

_SCRIPT = Path(__file__).resolve().parents[1] / "search_demo.py"
_QUERIES = 100  # different ones
_ODD_QUERIES = (
    "",
    " \n ",
    "\ud83d",
    "fish " * 4_000,
    "a\u0301\u200b\x00\U0001f469\u200d\U0001f467 <b>&",
    "日本語" * 300,
)
_TARGET = 2.0  # seconds
_TIMEOUT = 60.0  # seconds after which an answer counts as missing


def page_trial(args: Any, trial: Trial) -> None:
    """Ask each query once alone, then let all clients ask at once; every answer must be the one given alone."""
    # A shell that starts this in the background lets it, and all that it starts, ignore interruptions.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory() as folder:
        model_path = args.model_path or _saved_start(args.base_model, folder)
        flags = ["--model_path", model_path, "--corpus", str(Path(args.data_dir) / "scifact")]
        if args.feature_cache_dir:
            flags += ["--feature_cache_dir", args.feature_cache_dir]
        with _serving(flags, trial) as (address, process):
            asyncio.run(_load(args, trial, address, process))


def _saved_start(base_model: str, folder: str) -> str:
    """Save an encoder with a random head and a predictor."""
    import torch

    from ragcun_hf.model.base_models import load_base_model

    torch.manual_seed(0)
    load_base_model(base_model, projection_init="random", use_predictor=True).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def _serving(flags: list[str], trial: Trial) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start the page, and yield its address and its process, which is to be ended."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        command = [sys.executable, str(_SCRIPT), *flags, "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
        try:
            lines = iter(process.stdout or ())
            address = next((line.split()[2] for line in lines if line.startswith("Serving on ")), None)
            if address is None:
                errors.seek(0)
                raise RuntimeError(f"the page ended before it served: {errors.read()[-2_000:]}")
            yield address, process
        finally:
            process.kill()
            process.wait()
        errors.seek(0)
        said = errors.read()
        trial.count("tracebacks", said.count("Traceback"), of=1)
        if "Traceback" in said:
            trial.wrong.append(said[-2_000:])


async def _load(args: Any, trial: Trial, address: str, process: Any) -> None:
    import httpx

    generator = random.Random(0)
    path = Path(args.data_dir) / "scifact" / "queries.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    queries = [*(json.loads(line)["text"] for line in generator.sample(lines, _QUERIES)), *_ODD_QUERIES]
    # Shorter than the server keeps an idle connection; where it closes one just then, a browser asks again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1.0)
    async with httpx.AsyncClient(base_url=address, timeout=_TIMEOUT, limits=limits) as client:
        function = _search_function((await client.get("/config")).json())
        alone, seconds = {}, []
        for query in queries:
            answer, taken = await _ask(client, function, query, uuid.uuid4().hex)
            alone[query] = _shown(answer)
            seconds.append(taken)
        trial.note("median seconds of a query alone", float(np.median(seconds)), "s")
        trial.count("queries without an answer alone", sum(not found for found in alone.values()), of=len(queries))
        trial.note_process("of the page before", process.pid)
        clients = _Clients(client, function, alone, end=time.perf_counter() + args.seconds)
        tasks = [asyncio.create_task(clients.ask_until_the_end(number)) for number in range(args.clients)]
        await asyncio.sleep(args.seconds / 2)
        trial.note_process("of the page in the middle", process.pid)
        await asyncio.gather(*tasks)
        trial.note_process("of the page in the end", process.pid)
        clients.report(trial, args)
        waiting = [
            asyncio.create_task(_ask(client, function, queries[0], uuid.uuid4().hex)) for _ in range(args.clients)
        ]
        await asyncio.sleep(0.3)
        await _interrupt(process, trial)
        await asyncio.gather(*waiting, return_exceptions=True)


async def _interrupt(process: Any, trial: Trial) -> None:
    """End the page as Ctrl-C does, while queries wait."""
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    try:
        exit_code = await asyncio.to_thread(process.wait, _TIMEOUT)
    except subprocess.TimeoutExpired:
        exit_code = None
    trial.note("seconds from Ctrl-C, with queries waiting, to the end", time.perf_counter() - started, "s")
    trial.count(f"ends with exit code {exit_code}", int(exit_code != 0), of=1)


class _Clients:
    """Clients, each with a session of its own, and what they were answered."""

    def __init__(self, client: Any, function: int, alone: dict[str, Any], *, end: float) -> None:
        self._client, self._function, self._alone, self._end = client, function, alone, end
        self.seconds: list[float] = []
        self.num_unlike = 0
        self.errors: list[str] = []

    async def ask_until_the_end(self, number: int) -> None:
        """Ask one query after the other, as soon as the one before is answered."""
        import httpx

        generator, session, queries = random.Random(number), uuid.uuid4().hex, list(self._alone)
        while time.perf_counter() < self._end:
            query = generator.choice(queries)
            try:
                answer, seconds = await _ask(self._client, self._function, query, session)
            except (httpx.HTTPError, RuntimeError, TimeoutError) as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                continue
            self.seconds.append(seconds)
            self.num_unlike += _shown(answer) != self._alone[query]

    def report(self, trial: Trial, args: Any) -> None:
        """Note what the clients met."""
        answered = len(self.seconds)
        trial.note(f"answers to {args.clients} clients in {args.seconds:.0f} s", answered)
        trial.count("errors", len(self.errors), of=answered + len(self.errors))
        trial.count("answers unlike the one given alone", self.num_unlike, of=answered)
        trial.wrong += sorted(set(self.errors))[:3]
        for percent in (50, 95, 99):
            value, what = float(np.percentile(self.seconds or [np.inf], percent)), f"seconds of an answer, p{percent}"
            trial.claims.append(at_most(what, value, _TARGET, "s"))


def _search_function(config: dict[str, Any]) -> int:
    """Return the number of the function that a press on Enter calls."""
    return next(
        each["id"] for each in config["dependencies"] if any(event == "submit" for _, event in each["targets"])
    )


async def _ask(client: Any, function: int, query: str, session: str) -> tuple[str, float]:
    """Send a query as the page in a browser does; return the HTML of its answer, and the seconds until it came."""
    body = {"data": [query, False], "fn_index": function, "session_hash": session, "event_data": None}
    started, answer = time.perf_counter(), None
    async with asyncio.timeout(_TIMEOUT):
        # Half a surrogate pair, which a browser can send, is written as an escape.
        headers = {"content-type": "application/json"}
        sent = await client.post("/gradio_api/queue/join", content=json.dumps(body), headers=headers)
        sent.raise_for_status()
        # Read to the end: Gradio drops what a session asks while it notes that an earlier stream was broken off.
        async with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
            async for line in stream.aiter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("event_id") == sent.json()["event_id"] and message["msg"] == "process_completed":
                    answer, seconds = message["output"], time.perf_counter() - started
    if answer is None or "data" not in answer:
        raise RuntimeError(f"no answer to {query[:40]!r}: {answer}")
    return str(answer["data"][0]), seconds


def _shown(answer: str) -> list[str]:
    """Return an answer without its scores, which depend on the batch in their last digits."""
    return re.sub(r'(sp-score">[a-z ]+) -?[0-9.]+', r"\1", answer)
