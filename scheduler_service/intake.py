"""The way of a Generate call into the engine, whichever API it came through."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from nanovllm.v1 import inference_pb2
from scheduler_service.access.tenancy import Tenancy
from scheduler_service.engine import Engine
from scheduler_service.errors import DeadlineError, RequestError
from scheduler_service.live_request import LiveRequest
from scheduler_service.telemetry.call_record import CallRecord
from scheduler_service.telemetry.metrics import SchedulerMetrics
from scheduler_service.text.prompt_encoder import PromptEncoder
from scheduler_service.validation import RequestKey, TokenPrompt, validate_generate


class Intake:
    """Checks, reserves, tokenizes and submits, in that order."""

    def __init__(
        self,
        engine: Engine,
        encoder: PromptEncoder,
        metrics: SchedulerMetrics,
        tenancy: Tenancy,
    ) -> None:
        self._engine = engine
        self._encoder = encoder
        self._metrics = metrics
        self._tenancy = tenancy

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Counts what is raised inside, where a request is translated and admitted."""
        try:
            yield
        except RequestError as error:
            self._metrics.count_rejection(error.label)
            raise

    async def admit(
        self,
        request: inference_pb2.GenerateRequest,
        call: CallRecord,
        deadline_s: float | None,
    ) -> LiveRequest:
        """Returns the queued request. Raises RequestError.

        `deadline_s` is a time of `time.monotonic()`.
        """
        caller = call.caller
        owner = self._tenancy.owner_of(caller)
        self._engine.check_arrival(
            RequestKey(request.request_id, owner), caller.name, request.priority
        )
        call.spec = spec = validate_generate(request, self._engine.model)
        spec = replace(
            spec, owner=owner, cache_salt=self._tenancy.cache_salt(caller, spec.cache_salt)
        )
        with self._engine.reserve(spec, caller.name) as reservation:
            encoding = self._encoder.encode(spec.prompt, max_tokens=self._engine.max_model_len - 1)
            if isinstance(spec.prompt, TokenPrompt):
                # Nothing to wait for, so no task.
                token_ids = await encoding
            else:
                token_ids = await reservation.unless_aborted(encoding)
            if deadline_s is not None and time.monotonic() >= deadline_s:
                raise DeadlineError("the deadline of the call passed while its prompt was encoded")
            live = self._engine.submit(reservation, token_ids)
        call.begin(live)
        return live
