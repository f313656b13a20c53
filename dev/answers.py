"""What ComfyUI's answers say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def content(body: bytes) -> Any:
    """Return a body as JSON, or as text where it is none."""
    try:
        return json.loads(body)
    except ValueError:
        return body.decode(errors="replace")


def execution_error(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what ComfyUI recorded about the node that failed, or None."""
    return dict(entry["status"]["messages"]).get("execution_error")


def refusal(answer: Any) -> str:
    """Say in one line why a workflow was refused."""
    if not isinstance(answer, dict):
        return str(answer)
    causes = [
        f"{node.get('class_type')}: {error.get('message')} ({error.get('details')})"
        for node in (answer.get("node_errors") or {}).values()
        for error in node.get("errors", [])
    ]
    error = answer.get("error")
    general = error.get("message", error) if isinstance(error, dict) else error
    return "; ".join(causes) or str(general)
