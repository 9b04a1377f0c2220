"""The offline API: a model as a Python object."""

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from tqdm import tqdm

from nanovllm.aio import AsyncClient
from nanovllm.embedded.catalogue import SMOLLM2_135M_INSTRUCT
from nanovllm.errors import OverloadedError
from nanovllm.outputs import OutputFolder, RequestOutput
from nanovllm.requests import Chat, Message, Prompt, all_integers, generate_request
from nanovllm.sampling_params import SamplingParams
from nanovllm.services import LocalServices
from nanovllm.start_tasks import start_tasks
from nanovllm.tls import TlsConfig

Result = TypeVar("Result")

#: Requests under way at the same time; enough to fill a batch and the queue behind it.
MAX_CONCURRENCY = 1024
# A log line for each prompt would drown the progress bar. The caller's own environment wins.
_QUIET = {"NANOVLLM_SCHEDULER_LOG_LEVEL": "warning"}


class LLM:
    """A model for offline use, with the shape of vLLM's and nano-vLLM's class of that name.

    Starts both services as child processes over unix sockets, or uses running ones. Close it, or
    use it as a context manager; the services end with this process in any case.

        with LLM("Qwen/Qwen3-0.6B", max_model_len=4096) as llm:
            for output in llm.generate(["Hello", "One, two,"], SamplingParams(max_tokens=16)):
                print(output.text)
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        address: str | None = None,
        token: str | None = None,
        tls: TlsConfig | None = None,
        startup_timeout_s: float = 600.0,
        **engine_options: bool | float | str | None,
    ) -> None:
        """Starts or connects.

        Args:
            model: A directory, an embedded model's name or a hub id; default: the embedded
                smollm2-135m-instruct.
            address: A running scheduler to use instead of starting one.
            token: Its bearer token; see `Client`.
            tls: How it is trusted; see `Client`.
            startup_timeout_s: Limit for the services to become ready.
            **engine_options: The executor's command line options with underscores, for example
                dtype="bfloat16", max_model_len=4096, enforce_eager=True. None leaves one out.

        Raises:
            TypeError: `address` came together with `model` or engine options, or `token` or `tls`
                came without it.
            ModelNotFoundError: There is no such model.
            ServiceStartError: The services could not be started, or refused an option.
        """
        if address is not None and (model is not None or engine_options):
            raise TypeError(
                "address= names a running server, whose model and engine options are fixed; "
                "leave out model and " + (", ".join(engine_options) or "engine options")
            )
        if address is None and (token is not None or tls is not None):
            raise TypeError("token= and tls= belong to a running server; give its address=")
        self._services: LocalServices | None = None
        self._loop = _LoopThread()
        try:
            if address is None:
                self._services = LocalServices(
                    model or SMOLLM2_135M_INSTRUCT.name,
                    executor_args=executor_arguments(engine_options),
                    env=_QUIET | os.environ,
                    startup_timeout_s=startup_timeout_s,
                ).start()
                address = self._services.address
            self._client = self._loop.run(_connect(address, token, tls))
        except BaseException:
            self._loop.close()
            if self._services is not None:
                self._services.close()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts, all at the same time.

        Args:
            prompts: One prompt or a list of them. A prompt is text, a list of token ids,
                {"prompt_token_ids": ids} or {"prompt": text}.
            sampling_params: For all prompts, or one per prompt.
            use_tqdm: Whether a progress bar is shown.

        Returns:
            One output per prompt, in order.

        Raises:
            ValueError: The numbers of prompts and sampling parameters differ.
            NanovllmError: A request failed; see `Client.generate`. The others are cancelled.
        """
        return self._run_all(_as_prompts(prompts), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations, all at the same time.

        Args:
            messages: One conversation or a list of them; each message is
                {"role": ..., "content": ...}.
            sampling_params: For all conversations, or one per conversation.
            use_tqdm: Whether a progress bar is shown.
            chat_template_kwargs: Further variables of the model's chat template.

        Returns:
            One output per conversation, in order.

        Raises:
            ValueError: The numbers of conversations and sampling parameters differ.
            NanovllmError: A request failed; see `Client.generate`. The others are cancelled.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if one else messages)
        prompts = [
            Chat(messages=conversation, template_kwargs=chat_template_kwargs or {})
            for conversation in conversations
        ]
        return self._run_all(prompts, sampling_params, use_tqdm)

    def close(self) -> None:
        """Closes the connection and stops the services that this object started."""
        try:
            if not self._loop.closed:
                self._loop.run(self._client.close())
                self._loop.close()
        finally:
            if self._services is not None:
                self._services.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run_all(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params: list[SamplingParams | None] = [sampling_params] * len(prompts)
        else:
            params = list(sampling_params)
            if len(params) != len(prompts):
                raise ValueError(
                    f"{len(prompts)} prompts came with {len(params)} sampling parameters; give "
                    "one for all, or one per prompt"
                )
        with tqdm(total=len(prompts), desc="Prompts", disable=not use_tqdm) as bar:
            return self._loop.run(_complete_all(self._client, prompts, params, bar))


def executor_arguments(options: Mapping[str, bool | float | str | None]) -> list[str]:
    """Returns command line arguments: max_model_len=8 becomes --max-model-len 8.

    True becomes the bare option; False and None leave it out.
    """
    arguments = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(option)
        elif value is not None and value is not False:
            arguments += [option, str(value)]
    return arguments


class _LoopThread:
    """An event loop in a thread of its own, so that callers may have a loop themselves."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="nanovllm-llm", daemon=True
        )
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C reaches this thread while the work goes on in the other.
            future.cancel()
            raise

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _connect(address: str, token: str | None, tls: TlsConfig | None) -> AsyncClient:
    return AsyncClient(address, token=token, tls=tls, share_call=True)


async def _complete_all(
    client: AsyncClient,
    prompts: Sequence[Prompt],
    params: Sequence[SamplingParams | None],
    bar: "tqdm[Any]",
) -> list[RequestOutput]:
    outputs: dict[int, RequestOutput] = {}
    waiting = iter(enumerate(zip(prompts, params, strict=True)))
    progress = _Progress(bar)

    async def work() -> None:
        for index, (prompt, sampling_params) in waiting:
            outputs[index] = await _complete(client, prompt, sampling_params, progress)
            bar.update()

    try:
        async with asyncio.TaskGroup() as group:
            await start_tasks(group, min(MAX_CONCURRENCY, len(prompts)), work)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [outputs[index] for index in range(len(prompts))]


async def _complete(
    client: AsyncClient,
    prompt: Prompt,
    sampling_params: SamplingParams | None,
    progress: "_Progress",
) -> RequestOutput:
    while True:
        request = generate_request(prompt, sampling_params)
        folder = OutputFolder(request)
        try:
            async with client.start(request) as stream:
                async for delta in stream:
                    folder.add(delta)
                    progress.add_tokens(len(delta.token_ids))
            return folder.output()
        except OverloadedError as error:
            # Only a request that has produced nothing is refused so, so nothing is lost.
            await asyncio.sleep(error.retry_after_s)


class _Progress:
    """Shows the rate of generated tokens behind a bar that counts prompts."""

    def __init__(self, bar: "tqdm[Any]") -> None:
        self._bar = bar
        self._num_tokens = 0

    def add_tokens(self, count: int) -> None:
        self._num_tokens += count
        if not self._bar.disable:
            elapsed_s = self._bar.format_dict["elapsed"]
            rate = self._num_tokens / elapsed_s if elapsed_s > 0 else 0.0
            # Without a refresh the text is drawn at the bar's own pace.
            self._bar.set_postfix_str(f"{rate:.0f} tok/s", refresh=False)


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, (str, Mapping, Chat)):
        return [prompts]
    items = list(cast(Iterable[Any], prompts))
    if items and all_integers(items):
        return [items]
    return items
