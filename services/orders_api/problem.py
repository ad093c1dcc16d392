"""Refusals as problem details (RFC 9457): every one says what is wrong, and where."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

PROBLEM_JSON = "application/problem+json"

TITLES = {
    400: "Bad request",
    404: "Not found",
    405: "Method not allowed",
    408: "The body came too slowly",
    409: "In progress",
    413: "The body is too large",
    415: "Unsupported media type",
    422: "Not acceptable as it is",
    500: "Internal error",
    503: "Not available now",
}


class Mistake(msgspec.Struct, frozen=True):
    """One wrong field: a JSON pointer (RFC 6901) into the body, and what is wrong there."""

    pointer: str
    detail: str


class ProblemDetails(msgspec.Struct, frozen=True, omit_defaults=True):
    """The body of a refusal."""

    type: str
    title: str
    status: int
    detail: str
    errors: tuple[Mistake, ...] = ()


class Problem(Exception):
    """Raised anywhere below the router; it becomes the response."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Sequence[Mistake] = (),
        headers: Sequence[tuple[str, str]] = (),
        kind: str = "about:blank",
    ) -> None:
        self.status = status
        self.headers = list(headers)
        self.details = ProblemDetails(kind, TITLES[status], status, detail, tuple(errors))
        super().__init__(detail)
