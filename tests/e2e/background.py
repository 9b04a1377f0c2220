"""Requests that run while a test interferes."""

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from nanovllm import Client, Completion, RequestOutput, SamplingParams
from nanovllm.outputs import OutputFolder
from nanovllm.requests import Prompt, generate_request
from tests.e2e.support import LIMIT_S


class BackgroundRequest:
    """A request that another thread reads, with a view of how far it is."""

    def __init__(
        self,
        client: Client,
        threads: ThreadPoolExecutor,
        prompt: Prompt,
        params: SamplingParams,
        *,
        resume: bool | None = None,
    ) -> None:
        self._request = generate_request(prompt, params)
        self._client = client
        self._resume = resume
        self._progress = threading.Condition()
        self._num_tokens = 0
        self._ended = False
        self._future: Future[RequestOutput] = threads.submit(self._read)

    def _read(self) -> RequestOutput:
        folder = OutputFolder(self._request)
        try:
            with self._client.start(
                self._request, timeout_s=4 * LIMIT_S, resume=self._resume
            ) as stream:
                for delta in stream:
                    folder.add(delta)
                    with self._progress:
                        self._num_tokens += len(delta.token_ids)
                        self._progress.notify_all()
        finally:
            with self._progress:
                self._ended = True
                self._progress.notify_all()
        return folder.output()

    def wait_for_tokens(self, count: int) -> None:
        with self._progress:
            assert self._progress.wait_for(
                lambda: self._ended or self._num_tokens >= count, LIMIT_S
            )
            assert not self._ended, "the request ended before the test interfered"

    def output(self) -> RequestOutput:
        return self._future.result(4 * LIMIT_S)

    def completion(self) -> Completion:
        (completion,) = self.output().completions
        return completion

    def error(self) -> BaseException | None:
        return self._future.exception(4 * LIMIT_S)
