"""`outpace serve`: an OpenAI-compatible server."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ParameterError
from .common import engine_options, model_options, open_llm, say

if TYPE_CHECKING:
    from ..engine.llm import LLM

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SERVED = (  # of EngineOptions, beside those of every command
    *("methods", "max_batch", "max_queue", "kv_tokens", "swap_tokens", "max_step_s", "max_step_rows", "prefill_rows"),
    "prefix_cache",
)
NEEDED = ("fastapi", "uvicorn", "pydantic", "prometheus_client")  # the extra `serve`


def _seconds(flag: str, default: float, help: str) -> Any:
    kind = click.FloatRange(min=0, min_open=True)
    return click.option(flag, type=kind, default=default, show_default=True, metavar="SECONDS", help=help)


@click.command(short_help="Serve a model over HTTP, as OpenAI's API.")
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option(
    "--allow-host",
    "names",
    multiple=True,
    metavar="NAME",
    help="A name by which it may be called.  Repeatable.  [default: on this machine alone and without keys localhost, "
    "else any]",
)
@click.option(
    "--served-model-name",
    "--alias",
    "aliases",
    multiple=True,
    metavar="NAME",
    help="A name of the model.  Repeatable: requests may have any, responses have the first.  [default: its own]",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="A web page's origin whose scripts may call, as in https://chat.example; * is any.  Repeatable.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@engine_options(*SERVED, max_batch=16, max_queue=256, max_step_s=250)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help="Keys, one in a line (or OUTPACE_API_KEYS).",
)
@click.option("--share-prefixes", is_flag=True, help="Let all users share cached prefixes, drafts and turns.")
@click.option("--playground", is_flag=True, help="Serve a page to chat and watch, under /playground/.")
@click.option(
    "--grace", type=click.FloatRange(min=0), default=30.0, show_default=True, help="Seconds to finish in when stopped."
)
@click.option(
    "--max-body", type=click.IntRange(min=1), default=8 << 20, show_default=True, help="Most bytes of a request's body."
)
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), help="Longest prompt.  [default: what fits]")
@click.option(
    "--answer-tokens",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Longest answer of a chat that names no max_tokens.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=1000,
    show_default=True,
    help="Connections at once; one more closes the one that has been idle longest.",
)
@_seconds("--header-timeout", 10.0, "For the header of a request to arrive.")
@_seconds("--body-timeout", 30.0, "For a body to arrive, and a second more for each 10 kB that came.")
@_seconds("--idle-timeout", 30.0, "Between two requests of a connection.")
@_seconds("--write-timeout", 60.0, "For a client that does not read what it is sent.")
@click.option(
    "--responses-file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Keep the answers of /v1/responses there, for the next start too.  [default: in memory]",
)
@click.option(
    "--responses-mb",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Most of them, in MB; beyond it the oldest of whoever has most go.  0: none are kept.",
)
@click.option(
    "--responses-days",
    type=click.FloatRange(min=0, min_open=True),
    default=30.0,
    show_default=True,
    help="Forget them after so many days.",
)
@click.option("--log-prompts", is_flag=True, help="Write prompts and answers into the log.")
def serve(**options: Any) -> None:
    """Serve a model over HTTP, as OpenAI's API does: /v1/chat/completions, /v1/completions, /v1/responses,
    /v1/embeddings, /v1/models, and as Anthropic's: /v1/messages. Further routes are /tokenize, /detokenize, /health and
    /metrics. The log, one line of JSON for each request, goes to stderr.

    Ctrl-C or SIGTERM finishes what runs and refuses what comes; once more ends at once.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ParameterError(f'serving needs {", ".join(missing)}: python -m pip install "outpace[serve]"')
    from ..server.keys import Keys, read_keys
    from ..server.names import model_names, origins
    from ..server.routes.response_store import ResponseStore, StoreLimits
    from ..server.run import bind

    options |= {"aliases": model_names(options["aliases"]), "origins": origins(options["origins"])}

    keys = Keys(read_keys(options["api_key_file"]), options["share_prefixes"])
    limits = StoreLimits(
        bytes=options["responses_mb"] * 1_000_000,
        age_s=options["responses_days"] * 86400,
        conversation_bytes=options["max_body"],
    )
    options["store"] = ResponseStore(options["responses_file"], limits)
    listener = bind(options["host"], options["port"])
    with listener:
        say(f"outpace: loading {options['model']} …")
        _serve(open_llm(options), keys, listener, options)


def _serve(llm: LLM, keys: Any, listener: Any, options: dict[str, Any]) -> None:
    from ..server.app import create_app
    from ..server.connections import Patience
    from ..server.run import files_for, log_to_stderr, make_server
    from ..server.service import EngineService
    from ..server.submissions import Limits

    limits = Limits(
        body_bytes=options["max_body"],
        prompt_tokens=options["max_prompt_tokens"],
        answer_tokens=options["answer_tokens"],
    )
    if options["aliases"]:
        llm.name = options["aliases"][0]
    service = EngineService(llm)
    app = create_app(
        service,
        keys=keys,
        limits=limits,
        playground=options["playground"],
        log_prompts=options["log_prompts"],
        hosts=allowed_hosts(options["host"], options["names"], keys.needed),
        aliases=options["aliases"],
        origins=options["origins"],
        store=options["store"],
    )
    address = listener.getsockname()
    url = f"http://{_shown(options['host'])}:{address[1]}"
    log_to_stderr()
    patience = Patience(
        header_s=options["header_timeout"],
        body_s=options["body_timeout"],
        idle_s=options["idle_timeout"],
        write_s=options["write_timeout"],
        most=files_for(options["max_connections"]),
    )
    if patience.most < options["max_connections"]:
        say(
            f"outpace: the system allows {patience.most} connections, --max-connections wants more: raise the limit on "
            "open files (ulimit -n)"
        )

    def ready() -> None:
        gc.collect()
        gc.freeze()  # what is there now stays: a full collection need not look at a million objects each time
        welcome(llm, url, keys.needed, options)

    server = make_server(app, service, grace=options["grace"], patience=patience, ready=ready)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(1)


def allowed_hosts(host: str, names: Sequence[str], keyed: bool) -> frozenset[str] | None:
    """Who may reach this machine alone can do so through a page in its browser, whose name an attacker lets point here;
    where no key is asked for, the name is what tells such a page. None: any name.

    >>> sorted(allowed_hosts("127.0.0.1", ["box.lan"], keyed=False))
    ['127.0.0.1', '::1', 'box.lan', 'localhost']
    """
    if names or (host in LOOPBACK and not keyed):
        return frozenset({*LOOPBACK, *(name.lower() for name in names)})
    return None


def _shown(host: str) -> str:
    """A host as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def welcome(llm: LLM, url: str, keyed: bool, options: dict[str, Any]) -> None:
    """What it is and how to call it."""
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    data = '{"messages": [{"role": "user", "content": "Say hello."}]}'
    say(f'\n{llm.name}, {llm.method}, {llm.arithmetic}, at {url}/v1  (any OpenAI client: base_url="{url}/v1")\n')
    say(f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{data}'\n")
    if options["playground"]:
        say(f"  Playground: {url}/playground/")
    if not keyed and options["host"] not in LOOPBACK:
        say("  Everybody who reaches this address may use it: --api-key-file sets keys.")
    if "*" in options["origins"] and not keyed:
        say("  Every web page that you open may use it (--cors-origin '*'): --api-key-file sets keys.")
    say(f"  Ctrl-C stops it, within {options['grace']:g} s.\n")
