"""How much KV the conversations under way would like to keep."""

from collections import Counter

from benchmarks.routing.workloads import Conversation


class WorkingSet:
    """Tokens of the conversations between their first request and the end of their last answer.

    What conversations of a group share counts once.
    """

    def __init__(self) -> None:
        self._num_tokens = 0
        # By seed, without what is shared.
        self._own_tokens: dict[int, int] = {}
        self._group_sizes: Counter[int] = Counter()
        self._first_s: float | None = None
        self._changed_s = 0.0
        self._token_seconds = 0.0
        self._mean_tokens = 0.0

    @property
    def mean_tokens(self) -> float:
        """Mean over the time from the first start of a conversation to the last start."""
        return self._mean_tokens

    def arrive(self, conversation: Conversation, num_tokens: int, now_s: float) -> None:
        """A request arrives, whose conversation will have as many tokens with the answer."""
        self._pass_time(now_s)
        own = num_tokens - conversation.num_shared_tokens
        if conversation.seed not in self._own_tokens:
            self._start(conversation, now_s)
        self._num_tokens += own - self._own_tokens[conversation.seed]
        self._own_tokens[conversation.seed] = own

    def end(self, conversation: Conversation, now_s: float) -> None:
        """The last answer of a conversation has ended."""
        self._pass_time(now_s)
        self._num_tokens -= self._own_tokens.pop(conversation.seed)
        self._group_sizes[conversation.group] -= 1
        if not self._group_sizes[conversation.group]:
            self._num_tokens -= conversation.num_shared_tokens

    def _start(self, conversation: Conversation, now_s: float) -> None:
        if self._first_s is None:
            self._first_s = now_s
        elif now_s > self._first_s:
            self._mean_tokens = self._token_seconds / (now_s - self._first_s)
        if not self._group_sizes[conversation.group]:
            self._num_tokens += conversation.num_shared_tokens
        self._group_sizes[conversation.group] += 1
        self._own_tokens[conversation.seed] = 0

    def _pass_time(self, now_s: float) -> None:
        self._token_seconds += self._num_tokens * (now_s - self._changed_s)
        self._changed_s = now_s
