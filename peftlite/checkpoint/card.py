"""The model card: a README.md whose front matter tells the hub which model an adapter belongs to."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlite.checkpoint.hub import CARD_NAME, is_repo_id
from peftlite.config import atomic_path
from peftlite.errors import warn

PIPELINES = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""What the hub calls a task, by `task_type`."""

_FRONT = re.compile(r"\A---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Card:
    """What a card says: the base model's id or path, the kind of adapter, the task, whether transformers loads it."""

    base_model: str | None = None
    peft_type: str = "LORA"
    task_type: str | None = None
    transformers: bool = True
    tags: tuple[str, ...] = ()
    """More tags."""

    @property
    def base_id(self) -> str | None:
        """The base model, if it has an id on the hub: the hub refuses cards that name a path."""
        return self.base_model if self.base_model and is_repo_id(self.base_model) else None

    @property
    def front(self) -> dict[str, Any]:
        """The front matter."""
        base, pipeline = self.base_id, PIPELINES.get(self.task_type or "")
        named = {"base_model": base, "library_name": "peft", "pipeline_tag": pipeline}
        tags = [*([f"base_model:adapter:{base}"] if base else []), self.peft_type.lower()]
        tags += [*(["transformers"] if self.transformers else []), *self.tags]
        return {**{key: value for key, value in named.items() if value}, "tags": tags}

    @property
    def body(self) -> str:
        """The text of a new card."""
        base = self.base_id
        title = f"`{base}`" if base else "a base model"
        loaded = f'Auto.from_pretrained("{base}")' if base else "..."
        auto = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_CLS": "AutoModelForSequenceClassification"}
        name = auto.get(self.task_type or "", "AutoModel")
        first = f"from transformers import {name}\n" if base else ""
        return (
            f"# {self.peft_type} adapter for {title}\n\n"
            "Adapter weights only: they are loaded into the model that they were trained on.\n\n"
            "```python\n"
            f"{first}from peftlite import PeftModel\n\n"
            f"base = {loaded.replace('Auto.', name + '.')}\n"
            'model = PeftModel.from_pretrained(base, "this directory or repository")\n'
            "```\n\n"
            "The files are in the format of PEFT, which reads them too.\n"
        )


def write_card(directory: str | os.PathLike[str], card: Card) -> None:
    """Write the model card of the adapters in `directory`; of a card that is there, only our part of the front matter.

    Warns if the front matter of that card cannot be read, or the card not be written; it is then left alone.
    """
    path = Path(directory) / CARD_NAME
    try:
        new = _renewed(path, card)
        if new is not None:
            with atomic_path(path) as temporary:
                temporary.write_bytes(new)
    except OSError as error:
        warn(f"`{path}` could not be written: {error.strerror or error}.")


def _renewed(path: Path, card: Card) -> bytes | None:
    """What the card should hold now; None if it does already, or cannot be told."""
    import yaml  # type: ignore[import-untyped]

    old = path.read_bytes().decode("utf-8", "surrogateescape") if path.is_file() else ""
    found = _FRONT.match(old)
    try:
        front = yaml.safe_load(found.group(1)) or {} if found else {}
    except yaml.YAMLError:
        front = None
    if not isinstance(front, dict):
        warn(f"The front matter of `{path}` is not YAML: it is left as it is.")
        return None
    body = old[found.end() :] if found else old or f"\n{card.body}"
    tags = front.get("tags")
    own = [str(tag) for tag in tags] if isinstance(tags, list) else []
    merged = {**front, **card.front, "tags": list(dict.fromkeys([*own, *card.front["tags"]]))}
    text = yaml.safe_dump(merged, sort_keys=not front, allow_unicode=True, line_break="\n")
    new = f"---\n{text}---\n{body}".encode("utf-8", "surrogateescape")
    return None if path.is_file() and new == path.read_bytes() else new
