"""A dataclass field is described once, in its attribute docstring."""

import ast
import dataclasses
import inspect
import textwrap
from itertools import pairwise
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")


def document_fields(cls: type[T]) -> type[T]:
    """Fill `metadata["help"]` of every field, where HfArgumentParser looks for it, from its attribute docstring."""
    try:
        source = inspect.getsource(cls)
    except OSError:
        # a frozen application has no source, and no use for help texts
        return cls
    (body,) = ast.parse(textwrap.dedent(source)).body
    assert isinstance(body, ast.ClassDef)
    help_texts = {}
    for statement, following in pairwise(body.body):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                help_texts[name] = " ".join(text.split())
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        if field.name in help_texts:
            field.metadata = MappingProxyType({"help": help_texts[field.name]})
    return cls
