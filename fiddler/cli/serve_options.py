"""Options of `serve` about the server itself: addresses, keys, limits; with llama-server's names where it has them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fiddler.cli.option_groups import OptionGroup
from fiddler.cli.text_input import read_utf8
from fiddler.errors import RequestError

if TYPE_CHECKING:
    from fiddler.sampling.sampler import Sampling
    from fiddler.serving.http.options import ServerOptions

__all__ = ["SERVING", "ServeOptions"]

_LIMITS = "Limits"


@dataclass(frozen=True)
class ServeOptions:
    """Values of the options, as they were typed."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: list[str] | None = None
    cors_origin: list[str] | None = None
    alias: list[str] | None = None
    chat_template_file: Path | None = None
    chat_template_kwargs: str | None = None
    special: bool = False
    parallel: int | None = None
    count: int = -1
    token_limit: int | None = None
    queue: int = 256
    timeout: int = 3600
    body_limit: int = 16
    ui: bool = True
    metrics: bool = True
    slots: bool = True

    def to_server_options(self, sampling: Sampling) -> ServerOptions:
        """The options of the server. Raises BadParameter (usage error) where a value makes no sense."""
        from fiddler import __version__
        from fiddler.generation.request import Request
        from fiddler.serving.http.options import ServerOptions
        from fiddler.text.template_variables import parse_variables

        template = None
        if self.chat_template_file is not None:
            template = read_utf8(self.chat_template_file, "a chat template in Jinja")
        kwargs = {} if self.chat_template_kwargs is None else parse_variables(self.chat_template_kwargs).kwargs
        keys = [key for each in self.api_key or () for key in each.split(",")]
        try:
            return ServerOptions(
                host=self.host,
                port=self.port,
                api_keys=tuple(keys),
                cors_origins=tuple(self.cors_origin or ()),
                alias=tuple(self.alias or ()),
                defaults=Request("", sampling, None if self.count < 0 else self.count, special=self.special),
                token_limit=self.token_limit,
                parallel=self.parallel,
                queue=self.queue,
                timeout=float(self.timeout),
                body_limit=self.body_limit << 20,
                chat_template=template,
                template_kwargs=kwargs,
                page=self.ui,
                metrics=self.metrics,
                slots=self.slots,
                version=__version__,
            )
        except RequestError as error:
            raise typer.BadParameter(str(error)) from None


def _limit(*names: str, text: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=_LIMITS, **more)


SERVING = OptionGroup(
    ServeOptions,
    {
        "host": typer.Option("--host", help="Address to listen on; 0.0.0.0 for all of this machine."),
        "port": typer.Option("--port", min=0, max=65535, help="Port; 0 chooses a free one."),
        "api_key": typer.Option(
            "--api-key", envvar="FIDDLER_API_KEY", help="Key that requests must have; may be repeated."
        ),
        "cors_origin": typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Web origin whose pages may call the server, as https://example.org, or *; may be repeated.",
        ),
        "alias": typer.Option("-a", "--alias", help="Name of the model; the file's if not given. May be repeated."),
        "chat_template_file": typer.Option(
            "--chat-template-file", readable=False, help="Jinja template instead of the model's."
        ),
        "chat_template_kwargs": typer.Option(
            "--chat-template-kwargs", metavar="JSON", help='Variables of the template, as {"enable_thinking": false}.'
        ),
        "special": typer.Option(
            "--special", help="Read names of control tokens in prompts (not in messages); only for trusted clients."
        ),
        "ui": typer.Option("--ui/--no-ui", help="The web page at /."),
        "metrics": typer.Option("--metrics/--no-metrics", help="Metrics for Prometheus at /metrics."),
        "slots": typer.Option("--slots/--no-slots", help="What runs now, at /slots."),
        "parallel": _limit(
            "-np", "--parallel", min=1, text="Maximum of texts at once; if not given, it grows while throughput does."
        ),
        "count": _limit("-n", "--n-predict", min=-1, text="max_tokens of requests without it; -1: what --ctx leaves."),
        "token_limit": _limit("--token-limit", min=1, text="Maximum of new tokens a text, whatever is asked for."),
        "queue": _limit("--queue", min=1, text="Maximum of texts that run or wait; further ones get 503."),
        "timeout": _limit("--timeout", min=1, text="Longest time of a request [s]."),
        "body_limit": _limit("--body-limit", min=1, max=1024, text="Largest body of a request [MiB]."),
    },
)
