"""The process that renders chat templates: templates come with model files, so they run apart, with limits (layer 1).

Started as a script by chat_template.py; imports nothing of this package. It answers one request after another on stdin
and stdout, each a 4-byte little-endian length and that many bytes of JSON:

    {"template": str, "contexts": [{...}, ...], "cpu_seconds": int, "output_chars": int}
    -> {"results": [{"text": str} or {"error": str}, ...]}, one for each context

The first message that it writes, {"results": []}, says that it is ready.

Jinja's sandbox forbids reaching into Python, but not loops without end or texts without bound: address space, CPU time
and output length are limited here, and the parent kills a process that does not answer in time.
"""

from __future__ import annotations

import json
import struct
import sys
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.nodes
import jinja2.parser
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

ADDRESS_SPACE = 1 << 30


class Generation(Extension):
    """`{% generation %}`, which marks the assistant's text for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def raise_exception(message: str) -> None:
    """What templates call to refuse their input."""
    raise jinja2.exceptions.TemplateError(message)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Like `json.dumps`; Jinja's own `tojson` escapes for HTML, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def make_environment() -> ImmutableSandboxedEnvironment:
    """The environment that chat templates are written for (as in transformers' `apply_chat_template`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def render(template: jinja2.Template, context: dict[str, Any], output_chars: int) -> str:
    """The rendered text; raises TemplateError beyond `output_chars`."""
    pieces = []
    length = 0
    for piece in template.generate(**context):
        length += len(piece)
        if length > output_chars:
            raise jinja2.exceptions.TemplateError(f"the prompt grew beyond {output_chars} characters")
        pieces.append(piece)
    return "".join(pieces)


def answer(environment: ImmutableSandboxedEnvironment, request: dict[str, Any]) -> dict[str, Any]:
    """One result for each context of the request."""
    limit_cpu(request["cpu_seconds"])
    # one moment for all contexts of a request; templates use it to tell the model the date
    environment.globals["strftime_now"] = datetime.now().strftime
    results = []
    for context in request["contexts"]:
        try:
            template = environment.from_string(request["template"])
            results.append({"text": render(template, context, request["output_chars"])})
        except MemoryError:
            results.append({"error": "it needed too much memory"})
        except RecursionError:
            results.append({"error": "it recursed without end"})
        except jinja2.exceptions.TemplateSyntaxError as error:
            results.append({"error": f"line {error.lineno}: {error.message}"})
        except Exception as error:  # a template can raise whatever its expressions raise
            results.append({"error": str(error) or type(error).__name__})
    return {"results": results}


def limit_memory() -> None:
    """Bounds the address space, where the system can."""
    try:
        import resource
    except ImportError:  # not on this platform: the parent's clock is the only limit
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = ADDRESS_SPACE if hard == resource.RLIM_INFINITY else min(ADDRESS_SPACE, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def limit_cpu(seconds: int) -> None:
    """Bounds the CPU time from now on, so that a loop ends even when the parent is gone."""
    try:
        import resource
    except ImportError:
        return
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    limit = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def read_message(stream: BinaryIO) -> dict[str, Any] | None:
    """The next request; None when the parent is gone."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    body = stream.read(struct.unpack("<I", head)[0])
    return json.loads(body)


def write_message(stream: BinaryIO, message: dict[str, Any]) -> None:
    body = json.dumps(message).encode()
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()


def main() -> None:
    limit_memory()
    environment = make_environment()
    write_message(sys.stdout.buffer, {"results": []})
    while (request := read_message(sys.stdin.buffer)) is not None:
        write_message(sys.stdout.buffer, answer(environment, request))


if __name__ == "__main__":
    main()
