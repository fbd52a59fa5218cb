"""The JSON schema of `PretrainConfig`, described by the comments beside its fields."""

import ast
import inspect
import io
import tokenize
from typing import Any

from pydantic import TypeAdapter

from vishwamai_mp.config import schema


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe; `description` is a class's docstring or a field's trailing comment."""
    found = TypeAdapter(schema.PretrainConfig).json_schema()
    parts = {**found.get("$defs", {}), "PretrainConfig": found}
    for name, comments in field_comments().items():
        part = parts.get(name, {})
        part["description"] = inspect.getdoc(getattr(schema, name))
        for field, comment in comments.items():
            part["properties"][field]["description"] = comment
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def field_comments() -> dict[str, dict[str, str]]:
    """Of each dataclass of the schema: its fields that have a comment on their line, and the comment."""
    source = inspect.getsource(schema)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    return {
        node.name: {
            item.target.id: comments[item.end_lineno]
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.end_lineno in comments
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
