"""An answer under way: what was asked, what was said so far, and what it took."""

from dataclasses import dataclass, field

from torch import Tensor

from seekvl.engine.constrain import constraint_for
from seekvl.engine.guess import Guesser
from seekvl.engine.reply import Reply
from seekvl.engine.request import Completion, FinishReason, Likelihood, Piece, Request, Timings, Usage
from seekvl.engine.sampler import Sampler
from seekvl.models.vl2 import AnyConfig
from seekvl.processing.tokenizer import Tokenizer
from seekvl.runtime import PromptTooLongError


@dataclass(kw_only=True, slots=True)
class Clock:
    """Seconds spent on one answer so far."""

    vision: float = 0.0
    prefill: float = 0.0
    decode: float = 0.0


@dataclass(eq=False, kw_only=True, slots=True)
class Row:
    """An answer under way; get one from `start_row`."""

    request: Request
    reply: Reply
    sampler: Sampler
    guesser: Guesser
    end_id: int
    room: int
    """Tokens it may still have."""
    cached: int = 0
    """Tokens of its prompt that were taken over."""
    features: dict[int, Tensor] = field(default_factory=dict)
    """Rows f[s, d] of the pictures that the prefill still needs."""
    clock: Clock = field(default_factory=Clock)
    cancelled: bool = False
    """Whether it is to end before the next step."""
    done: bool = False

    @property
    def last(self) -> int:
        """The token that was chosen last and is fed next."""
        return self.sampler.generated[-1]

    def take(self, token: int, *, likelihood: Likelihood | None = None) -> Piece:
        """Add a token to the answer."""
        if token == self.end_id:
            return self.end("stop")
        self.sampler.generated.append(token)
        self.guesser.take(token)
        self.room -= 1
        text = self.reply.push(token)
        constraint = self.sampler.constraint
        if self.reply.stopped or (constraint is not None and constraint.over):
            return self.end("stop", text=text, token=token, likelihood=likelihood)
        if self.room == 0:
            return self.end("length", text=text, token=token, likelihood=likelihood)
        return Piece(text=text, token_id=token, likelihood=likelihood)

    def end(
        self,
        reason: FinishReason,
        *,
        text: str = "",
        token: int | None = None,
        likelihood: Likelihood | None = None,
    ) -> Piece:
        """Finish the answer; `text`, `token` and its likelihood come from its last token."""
        self.done = True
        text += self.reply.finish()
        ids, bill, clock = self.sampler.generated, self.request.inputs.bill, self.clock
        completion = Completion(
            token_ids=tuple(ids),
            text=self.reply.text,
            pictures=len(bill.image_tokens),
            begun=self.request.begun,
            finish_reason="stop" if self.reply.stopped else reason,
            usage=Usage(
                prompt_tokens=bill.total,
                image_tokens=sum(bill.image_tokens),
                completion_tokens=len(ids),
                cached_tokens=self.cached,
            ),
            timings=Timings(
                preprocess=self.request.preprocess_seconds,
                vision=clock.vision,
                prefill=clock.prefill,
                decode=clock.decode,
            ),
        )
        return Piece(text=text, token_id=token, likelihood=likelihood, completion=completion)


def start_row(config: AnyConfig, tokenizer: Tokenizer, request: Request, *, guess: int) -> Row:
    """Make the row of a request, which guesses up to so many tokens ahead.

    Raises SeekVLError for a prompt that leaves no room for an answer.
    """
    prompt, limit = len(request.inputs.input_ids), config.language.max_positions
    if prompt + 1 > limit:
        raise PromptTooLongError(
            f"the prompt takes {prompt:,} tokens and the model's longest sequence is {limit:,}: "
            "no room for an answer; shorten the prompt"
        )
    params = request.params
    end_id = tokenizer.eos_id if request.end_id is None else request.end_id
    room = min(params.max_new_tokens, limit - prompt)
    constraint = constraint_for(params.constrain, tokenizer, end_id=end_id, room=room, begun=request.begun)
    return Row(
        request=request,
        reply=Reply(tokenizer.stream(), stops=params.stops, strip=request.strip),
        sampler=Sampler(params=params, prompt=_counted(request), constraint=constraint),
        guesser=Guesser(request.inputs.input_ids.tolist(), most=guess),
        end_id=end_id,
        room=room,
    )


def _counted(request: Request) -> frozenset[int]:
    """Return the tokens of the prompt that the repetition penalty counts."""
    counts = request.penalise_prompt and request.params.repetition_penalty != 1.0
    return frozenset(request.inputs.input_ids.tolist()) if counts else frozenset()
