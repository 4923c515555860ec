"""Flows run in processes of their own, under the stand-in; pytest must not import them."""

from __future__ import annotations

collect_ignore_glob = ["flows/*"]
