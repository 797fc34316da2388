"""A loaded model behind a server: the worker, threads for text and grammars, and the texts that requests wait for.

Knows no protocol: routes hand it checked requests, and read events.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from fiddler.errors import FiddlerError
from fiddler.generation.events import Failed, Finished, Token
from fiddler.generation.request import Request
from fiddler.serving.chat_prompts import ChatPrompts
from fiddler.serving.http.errors import HttpError, StoppingError
from fiddler.serving.http.latency import Histogram
from fiddler.serving.http.options import ServerOptions
from fiddler.serving.http.sse import EventStream
from fiddler.serving.request_fields import flag, whole
from fiddler.serving.worker import Delivery, Worker
from fiddler.telemetry.totals import Totals

if TYPE_CHECKING:
    from fiddler.engine import Engine

__all__ = ["Service", "Texts"]

T = TypeVar("T")
_TEXT_THREADS, _GRAMMAR_THREADS = 4, 2
_MORE_TIME = 10.0  # for a client to read the end of a stream that took all its time [s]
_TOGETHER = 64  # events of an answer in one piece; more take memory


class Service:
    """What all routes share. `started`: time.time() of its start. Made and used on the event loop's thread."""

    def __init__(
        self, engine: Engine, options: ServerOptions, totals: Totals, report: Callable[[BaseException], None]
    ) -> None:
        """totals: the recorder that the engine was loaded with. report: receives errors that are no request's."""
        self.engine, self.options, self.totals, self.report = engine, options, totals, report
        metadata = engine.model_file.file.metadata
        self.prompts = ChatPrompts(engine.tokenizer, metadata, options.chat_template, options.template_kwargs)
        self.path = engine.model_file.file.path
        self.names = options.alias or (self.path.stem,)
        self.started = time.time()
        self._loop = asyncio.get_running_loop()
        self.worker = Worker(engine, self._receive, report, options.parallel)
        self._texts: set[Texts] = set()
        self._open = 0  # texts of all requests
        self._arriving: set[asyncio.Task[Any] | None] = set()  # of requests whose texts are still to be opened
        self.watchers = 0  # of the experts
        self.first_tokens = Histogram()
        self._stopping = self._ended = False
        self._text_threads = ThreadPoolExecutor(_TEXT_THREADS, "fiddler-text")
        self._grammar_threads = ThreadPoolExecutor(_GRAMMAR_THREADS, "fiddler-grammar")

    @cached_property
    def pieces(self) -> list[bytes]:
        """Each token's text, by id; names of control tokens."""
        return self.engine.tokenizer.pieces(special=True)

    @property
    def busy(self) -> bool:
        """Whether a request waits for texts."""
        return bool(self._texts)

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._stopping

    async def on_text(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a function that encodes or renders text, on a thread for it. Raises StoppingError at the end."""
        self._check_open()
        return await self._loop.run_in_executor(self._text_threads, work, *arguments)

    async def on_grammar(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call a function that reads a stranger's grammar, on a thread for it. Raises StoppingError at the end."""
        self._check_open()
        return await self._loop.run_in_executor(self._grammar_threads, work, *arguments)

    def open(self, requests: Sequence[Request], body: Mapping[str, Any]) -> Texts:
        """Start texts. The caller must close them.

        Raises HttpError where there are too many, or the server stops; RequestError where the body's fields on
        streaming make no sense: after this nothing may raise before the texts are closed.
        """
        streamed, ping = flag(body, "stream"), whole(body, "sse_ping_interval", 0) or self.options.ping
        if self._stopping:
            raise HttpError(503, "the server is stopping", retry=10)
        if self._open + len(requests) > self.options.queue:
            raise HttpError(503, f"{self._open} texts are running or waiting already; try again later", retry=1)
        self._open += len(requests)
        texts = Texts(self, len(requests), streamed, max(ping, 0))
        self._texts.add(texts)
        self._arriving.discard(asyncio.current_task())
        self.worker.submit(texts, requests, len(self._arriving))
        return texts

    def arrived(self) -> None:
        """The body of the current task's request has arrived: an idle worker waits a moment for its texts."""
        task = asyncio.current_task()
        if task is not None and task not in self._arriving:
            self._arriving.add(task)
            task.add_done_callback(self._gone)
            self.worker.expect(len(self._arriving))

    def _gone(self, task: asyncio.Task[Any]) -> None:
        """A request has ended; it may have opened no texts."""
        if task in self._arriving:
            self._arriving.remove(task)
            self.worker.expect(len(self._arriving))

    def stream(
        self,
        events: AsyncIterator[bytes],
        texts: Texts,
        failure: Callable[[HttpError], Sequence[bytes]] | None = None,
    ) -> EventStream:
        """A response that streams events of texts; failure: see `EventStream`."""
        return EventStream(
            events,
            texts.close,
            ping=texts.ping,
            timeout=self.options.timeout + _MORE_TIME,
            failure=failure,
            report=self.report,
        )

    def closed(self, texts: Texts) -> None:
        """Called by `Texts` when nobody waits for them any more; ends those that still run."""
        self._texts.discard(texts)
        self._open -= texts.count
        if texts.left:
            self.worker.cancel(texts)

    def _check_open(self) -> None:
        if self._ended:
            raise StoppingError("the server is stopping")

    def refuse(self) -> None:
        """Refuse new requests from now on."""
        self._stopping = True

    async def stop(self) -> None:
        """End all requests and threads; open streams get an error as their last event."""
        self.refuse()
        self._ended = True
        await asyncio.to_thread(self.worker.close)
        for texts in list(self._texts):
            texts.fail(StoppingError("the server is stopping"))
        self._text_threads.shutdown(wait=False, cancel_futures=True)
        self._grammar_threads.shutdown(wait=False, cancel_futures=True)
        self.prompts.close()

    def _receive(self, deliveries: list[Delivery]) -> None:
        """Hand a step's events over to the event loop; called on the worker's thread."""
        self._loop.call_soon_threadsafe(_distribute, deliveries)


def _distribute(deliveries: list[Delivery]) -> None:
    for delivery in deliveries:
        assert isinstance(delivery.owner, Texts)
        delivery.owner.put(delivery)


class Texts:
    """The texts of one HTTP request: iterate for their events, until all have ended.

    streamed: whether the client wants them as a stream; if not, events come many at a time. ping: seconds of silence
    before a comment in a stream; 0 for none.
    """

    def __init__(self, service: Service, count: int, streamed: bool, ping: float) -> None:
        self.count = self.left = count  # `left`: that have not ended
        self.streamed, self.ping = streamed, ping
        self._service, self._closed = service, False
        self._deliveries: deque[Delivery] = deque()
        self._due: asyncio.Future[None] | None = None  # while somebody waits for events
        self._opened, self._begun = time.perf_counter(), set[int]()
        self._expired = False
        self._timer = asyncio.get_running_loop().call_later(service.options.timeout, self._expire)

    def put(self, delivery: Delivery) -> None:
        """Add an event."""
        if not self._closed:
            self.left -= isinstance(delivery.event, Finished | Failed)
            if isinstance(delivery.event, Token) and delivery.number not in self._begun:
                self._begun.add(delivery.number)
                self._service.first_tokens.add(delivery.at - self._opened)
            self._deliveries.append(delivery)
            enough = self.streamed or not self.left or len(self._deliveries) >= _TOGETHER
            if self._due is not None and not self._due.done() and (enough or isinstance(delivery.event, Failed)):
                self._due.set_result(None)

    def fail(self, error: FiddlerError) -> None:
        """End all that have not ended."""
        for index in range(self.left):
            self.put(Delivery(self, index, Failed(-1, error), time.perf_counter()))

    def __aiter__(self) -> Texts:
        return self

    async def __anext__(self) -> Delivery:
        """The next event. Raises the error of a text that failed, and TimeoutError after the time of one request."""
        if not self._deliveries:
            if not self.left:
                raise StopAsyncIteration
            if self._expired:
                raise TimeoutError
            self._due = asyncio.get_running_loop().create_future()
            await self._due
        delivery = self._deliveries.popleft()
        if isinstance(delivery.event, Failed):
            raise delivery.event.error
        return delivery

    def close(self) -> None:
        """Nobody waits any more: what still runs ends before its next step."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._service.closed(self)

    def _expire(self) -> None:
        """The time of one request is over."""
        self._expired = True
        if self._due is not None and not self._due.done():
            self._due.set_exception(TimeoutError())
