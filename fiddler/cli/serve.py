"""The command `serve`: a model behind HTTP, in OpenAI's, Anthropic's and llama.cpp's protocols."""

from __future__ import annotations

import os
import signal
import socket
import traceback
from contextlib import closing

from fiddler.cli.option_groups import with_options
from fiddler.cli.options import LOADING, ModelOrDemo, loaded, opened, say
from fiddler.cli.sampling_options import SAMPLING, SamplingOptions
from fiddler.cli.serve_options import SERVING, ServeOptions
from fiddler.errors import FiddlerError
from fiddler.load_options import LoadOptions

__all__ = ["serve"]

_SAMPLING = SAMPLING.with_help(
    seed="Seed of requests without one; -1: random.", n_probs="Log-probabilities a token, of requests without n_probs."
)


@with_options(SERVING, _SAMPLING, LOADING)
def serve(
    model: ModelOrDemo = None,
    *,
    serving: ServeOptions,
    sampling: SamplingOptions,
    loading: LoadOptions,
) -> None:
    """Serve a model over HTTP: OpenAI's, Anthropic's and llama.cpp's protocols, and a web page.

    Requests override the sampling options. Prints one line with the address when it is ready.
    """
    _check_installed()
    options = serving.to_server_options(sampling.to_sampling())
    from fiddler.serving.http.run import open_socket, run
    from fiddler.telemetry.totals import Totals

    model_file = opened(model)
    # before the load: a port that is taken should not cost minutes
    with closing(open_socket(options.host, options.port)) as listener:
        if options.beyond_loopback and not options.api_keys:
            say(f"warning: {options.host} is reachable from other machines, and there is no --api-key")
        config = model_file.config
        totals = Totals(len(config.sparse_layers), config.expert_count)
        engine = loaded(model_file, loading, totals)

        def ready() -> None:
            print(f"{engine.model_file.file.path.name} at {_url(options.host, listener)}", flush=True)

        number = run(engine, options, totals, listener, ready, _report)
    if number == signal.SIGINT:
        raise KeyboardInterrupt


def _check_installed() -> None:
    """Raise FiddlerError, which says what to install, unless the packages of the extra `serve` are there."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise FiddlerError(f"fiddler serve needs {error.name}: pip install 'fiddler-moe[serve]'") from None


def _url(host: str, listener: socket.socket) -> str:
    """The address that a browser on this machine takes."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


def _report(error: BaseException) -> None:
    """One line to stderr; the whole traceback where it is asked for."""
    if os.environ.get("FIDDLER_TRACEBACK") == "1":
        traceback.print_exception(error)
    say(f"error: internal: {type(error).__name__}: {error}")
