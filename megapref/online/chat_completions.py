"""Many questions at a time to an HTTP endpoint that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, hosted models.

What fails is sent again, with waits that grow and that heed Retry-After. What still fails follows the endpoint's `on_failure` and is counted.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
import tenacity

from megapref import phases

LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more
NOT_NOW = (408, 409, 425, 429)  # and 500 to 599: the same request may succeed later
WRONG = (401, 404, 405)  # none will succeed


@dataclass(frozen=True)
class Endpoint:
    """Where to ask and how patiently; times are in seconds.

    `on_failure` says what a request without a usable answer leads to: "stop", an error; "abstain", no answer, once it was sent again `retries`
    times; "retry", the same, but a server that is down or overloaded is asked for as long as `patience` lasts, and then it is an error.
    """

    url: str  # up to /v1
    api_key_env: str | None  # environment variable with the key
    concurrency: int  # requests under way
    timeout: float  # of one attempt
    retries: int
    backoff: float  # before the second attempt, then doubled
    patience: float  # for all questions together
    on_failure: str


@dataclass
class Failure(Exception):
    """Why a request has no usable answer, and whether the server is the cause, and whether to send it again."""

    reason: str
    is_down: bool = False
    is_final: bool = False
    is_mistake: bool = False  # of the user: no request will succeed
    wait: float = 0.0
    text: str | None = None  # the answer that was of no use


async def ask(
    endpoint: Endpoint, requests: dict[str, dict[str, Any]], is_usable: Callable[[str], bool], keep: Callable[[str, str], None]
) -> tuple[dict[str, str], Counter[str], str | None]:
    """The answers by the requests' keys, what was counted, and why the first request without a usable answer has none.

    Each answer is given to `keep` as it comes, one that is not usable when it is the last attempt's. ValueError where a failure is to stop the run;
    what is under way then is waited for and kept.
    """
    answers: dict[str, str] = {}
    counts: Counter[str] = Counter()
    reasons: list[str] = []
    errors: list[str] = []
    slots, deadline = asyncio.Semaphore(endpoint.concurrency), asyncio.get_running_loop().time() + endpoint.patience

    def failed(key: str, failure: Failure) -> None:
        counts["failures"] += 1
        reasons.append(failure.reason)
        if failure.is_mistake or endpoint.on_failure == "stop" or (endpoint.on_failure == "retry" and failure.is_down):
            errors.append(failure.reason)
        elif failure.text is not None:
            answers[key] = failure.text
            keep(key, failure.text)

    async def answer(client: httpx2.AsyncClient, key: str) -> None:
        async with slots:
            if errors:
                return
            try:
                async with asyncio.timeout_at(deadline):
                    answers[key] = await _retrying(endpoint, deadline)(_attempt, client, endpoint, requests[key], is_usable, counts)
                keep(key, answers[key])
            except TimeoutError:
                failed(key, Failure(f"no answer within patience={endpoint.patience:g} seconds", is_down=True))
            except Failure as failure:
                failed(key, failure)

    if requests:
        async with httpx2.AsyncClient(headers=_headers(endpoint), timeout=None) as client:
            await asyncio.gather(*(answer(client, key) for key in requests))
    if errors:
        raise ValueError(f"{endpoint.url}: {errors[0]}; {len(answers)} of {len(requests)} answers were had")
    return answers, counts, reasons[0] if reasons else None


def _headers(endpoint: Endpoint) -> dict[str, str]:
    if not endpoint.url.startswith(("http://", "https://")):
        raise ValueError(f"url={endpoint.url} must begin with http:// or https:// and go up to /v1")
    if endpoint.api_key_env is None:
        return {}
    if not os.environ.get(endpoint.api_key_env):
        raise ValueError(f"api_key_env={endpoint.api_key_env}: this environment variable is not set; export it on every node")
    return {"Authorization": f"Bearer {os.environ[endpoint.api_key_env]}"}


def _retrying(endpoint: Endpoint, deadline: float) -> tenacity.AsyncRetrying:
    grows = tenacity.wait_exponential_jitter(initial=endpoint.backoff, max=LONGEST_WAIT, jitter=endpoint.backoff)

    def is_over(state: tenacity.RetryCallState) -> bool:
        for_ever = endpoint.on_failure == "retry" and state.outcome.exception().is_down
        too_late = asyncio.get_running_loop().time() + state.upcoming_sleep > deadline
        return too_late or (not for_ever and state.attempt_number > endpoint.retries)

    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(lambda error: isinstance(error, Failure) and not error.is_final),
        wait=lambda state: max(grows(state), state.outcome.exception().wait),
        stop=is_over,
        reraise=True,
    )


async def _attempt(
    client: httpx2.AsyncClient, endpoint: Endpoint, request: dict[str, Any], is_usable: Callable[[str], bool], counts: Counter[str]
) -> str:
    """The text of the answer; Failure where there is none, or none that is usable."""
    phases.moved()
    counts["requests"] += 1
    try:
        async with asyncio.timeout(endpoint.timeout):
            response = await client.post(f"{endpoint.url.rstrip('/')}/chat/completions", json=request)
    except TimeoutError as error:
        raise Failure(f"no answer within timeout={endpoint.timeout:g} seconds", is_down=True) from error
    except httpx2.RequestError as error:
        raise Failure(f"{type(error).__name__}: {error}", is_down=True) from error
    if not response.is_success:
        down = response.status_code in NOT_NOW or response.is_server_error
        reason = f"HTTP {response.status_code}: {response.text[:200]}"
        raise Failure(reason, down, is_final=not down, is_mistake=response.status_code in WRONG, wait=_retry_after(response))
    try:
        content = response.json()
        text = content["choices"][0]["message"]["content"] or ""
        usage = content.get("usage") or {}
        for name in ("prompt_tokens", "completion_tokens"):
            counts[name] += usage.get(name) or 0
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        counts["garbage"] += 1
        raise Failure(f"not an answer of chat completions: {response.text[:200]!r}") from error
    if not is_usable(text):
        counts["garbage"] += 1
        raise Failure(f"no verdict in the answer {text[:200]!r}", text=text)
    return text


def _retry_after(response: httpx2.Response) -> float:
    """The seconds that the server asks to wait, given as such or as a date; 0 where it does not."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0
