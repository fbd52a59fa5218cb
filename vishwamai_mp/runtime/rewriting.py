"""Loads modules of other packages with their syntax trees rewritten, and keeps their bytecode."""

import ast
import hashlib
import importlib.machinery
import importlib.util
import marshal
import sys
import types
from pathlib import Path
from typing import ClassVar


def rewritten(source: str | bytes, path: str, transformer: ast.NodeTransformer) -> ast.Module:
    """The syntax tree of a module, transformed."""
    return ast.fix_missing_locations(transformer.visit(ast.parse(source, path)))


class RewritingLoader(importlib.machinery.SourceFileLoader):
    """Loads a module as a transformer leaves it.

    A package takes seconds to rewrite, and every process imports it anew. So the bytecode is kept where Python keeps
    that of the module as it is, in `__pycache__` beside it, under the transformer's name, and where Python would keep
    none, none is kept.

    Attributes:
        transformer: of a name in letters and digits, and without arguments; its result depends on the source alone.
    """

    transformer: ClassVar[type[ast.NodeTransformer]]

    def rewrites(self, source: bytes) -> bool:
        """Whether a module is rewritten at all."""
        return True

    def get_code(self, fullname: str) -> types.CodeType | None:
        path = self.get_filename(fullname)
        source = self.get_data(path)
        if not self.rewrites(source):
            return super().get_code(fullname)
        kept = importlib.util.cache_from_source(path, optimization=self.transformer.__name__)
        made_from = importlib.util.MAGIC_NUMBER + _digest_of(self.transformer) + hashlib.sha256(source).digest()
        try:
            content = self.get_data(kept)
            if content.startswith(made_from):
                return marshal.loads(content[len(made_from) :])
        except (OSError, EOFError, ValueError, TypeError):  # there is none, or a part of one
            pass
        code = compile(rewritten(source, path, self.transformer()), path, "exec", dont_inherit=True)
        if not sys.dont_write_bytecode:
            self.set_data(kept, made_from + marshal.dumps(code))  # whole or, where nobody may write, not at all
        return code


def _digest_of(transformer: type) -> bytes:
    """Of the files that a transformer and those that it derives from are written in."""
    files = {sys.modules[cls.__module__].__file__ for cls in transformer.__mro__ if cls is not object}
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in sorted(filter(None, files)))).digest()
