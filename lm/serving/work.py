"""What is asked of a served model, computed in batches by the one thread that owns the model."""

import collections
import dataclasses
import functools
import itertools
import sys
import threading
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm import command_line, predict
from lm.config import Config
from lm.data.record import Record
from lm.data.tokenizer import Tokenizer
from lm.decoding import sampling
from lm.predict import LoadedModel
from lm.terminal import say

_STEP = 4  # ids, by which texts grow between two looks at who still wants one
_LEAST_CACHE = 16  # new ids; larger caches are powers of two, so that few programs are compiled
_REPLACEMENT = "\ufffd"  # what bytes that are no character decode to


class Refused(ValueError):
    """A request that is answered with an error, in OpenAI's form.

    Attributes:
      status: of HTTP.
      code: for programs, such as 'context_length_exceeded'.
      param: the parameter that is wrong; '' = none in particular.
    """

    def __init__(self, status: int, message: str, code: str = "invalid_request", param: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


# What is told of a job: any number of pieces of its text, then what it has become.


class Piece(NamedTuple):
    """More of a text; of a job that is streamed."""

    text: str


class Text(NamedTuple):
    """A whole text, and whether a stop id or string ended it; else it has the most ids that were asked for."""

    made: predict.Generated
    is_ended: bool


Event = Piece | Text | predict.Embedded | dict[str, Any] | Refused  # a dict is a prediction


@dataclasses.dataclass(eq=False)
class Job:
    """One prompt or record.

    Attributes:
      kind: how it is computed; jobs of equal kinds are computed together.
      given: a `Prompt` or a record, as the kind says.
      tell: called by the thread that computes.
      is_gone: whether nobody waits for it any more.
      has_piece: whether it was told a part of its text.
      is_done: whether it was told what it has become.
    """

    kind: "Generate | Embed | Label"
    given: Any
    tell: Callable[[Event], None]
    is_gone: bool = False
    has_piece: bool = False
    is_done: bool = False

    def add(self, text: str) -> None:
        self.has_piece = True
        self.tell(Piece(text))

    def finish(self, event: Event) -> None:
        self.is_done = True
        self.tell(event)


class Worker:
    """The thread that computes, and the jobs that wait for it, first come, first served."""

    def __init__(self, loaded: LoadedModel, *, most_waiting: int) -> None:
        self.most_waiting = most_waiting
        self._loaded = loaded
        self._waiting: collections.deque[Job] = collections.deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="model")
        self._thread.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Raises Refused, and takes none of the jobs, if they would be more waiting ones than may wait."""
        with self._changed:
            if self._is_closed:
                raise Refused(503, "the server is stopping", "stopping")
            if len(jobs) > self.most_waiting:
                message = f"{len(jobs)} prompts or inputs; expected at most {self.most_waiting} in one request"
                raise Refused(400, message, "too_many_inputs")
            if len(self._waiting) + len(jobs) > self.most_waiting:
                raise Refused(503, f"{len(self._waiting)} others are waiting; try again in a second", "queue_full")
            self._waiting.extend(jobs)
            self._changed.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more."""
        with self._changed:
            for job in jobs:
                job.is_gone = True
            self._waiting = collections.deque(job for job in self._waiting if not job.is_gone)

    def close(self) -> None:
        """Ends what is computed at its next step, refuses what waits, and ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[Job]:
        """The first job that waits, with those of its kind, as many as make a batch."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return []
            kind = self._waiting[0].kind
            alike = (job for job in self._waiting if job.kind == kind)
            taken = list(itertools.islice(alike, self._loaded.batch_size))
            chosen = set(taken)
            self._waiting = collections.deque(job for job in self._waiting if job not in chosen)
            return taken

    def _run(self) -> None:
        while jobs := self._next():
            self._compute(jobs)
        for job in self._waiting:
            job.finish(Refused(503, "the server is stopping", "stopping"))

    def _compute(self, jobs: list[Job]) -> None:
        try:
            jobs[0].kind.compute(self._loaded, jobs, lambda: self._is_closed)
        except Exception as error:
            for job in jobs:
                if (
                    len(jobs) > 1 and not job.has_piece and not job.is_done
                ):  # another may be the cause: it is tried alone
                    self._compute([job])
                elif not job.is_done:
                    job.finish(as_refusal(error))
            return
        for job in jobs:
            if not (job.is_done or job.is_gone):
                job.finish(Refused(503, "the server is stopping", "stopping"))


def as_refusal(error: Exception) -> Refused:
    """What the client is told of an error: its message if it is one of our own; others are printed here."""
    if isinstance(error, Refused):
        return error
    if command_line.is_expected(error):
        return Refused(400, str(error))
    say("".join(traceback.format_exception(error)), file=sys.stderr, end="")
    return Refused(500, "an error of the server; its terminal shows more", "internal_error")


# Texts ----------------------------------------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """What a text begins with.

    Attributes:
      ids: of the prompt, in the form of the run's task.
      seed: of the sampling.
      is_streamed: whether pieces of the text are told.
    """

    ids: list[int]
    seed: int
    is_streamed: bool


@dataclasses.dataclass(frozen=True)
class Generate:
    """Texts are computed together if their options are alike, and their prompts padded alike.

    Attributes:
      cfg: of the run, with the options in `generate`.
      log_probs: whether they are wanted.
      padded_len: of the prompts, see `padded_len`.
    """

    cfg: Config = dataclasses.field(compare=False)
    options: Hashable
    log_probs: bool
    padded_len: int

    def compute(self, loaded: LoadedModel, jobs: Sequence[Job], is_closed: Callable[[], bool]) -> None:
        """A text is that of `LoadedModel.generate([prompt], seed=seed, beams=0)`, whatever it is computed with."""
        cfg, tokenizer = self.cfg, loaded.tokenizer
        most = cfg.generate.max_new_tokens
        steps = sampling.sample_in_steps(
            *(loaded.model, loaded.params, [job.given.ids for job in jobs]),
            jnp.stack([_key(job.given.seed) for job in jobs]),
            *(cfg, tokenizer),
            every=_STEP,
            rows_multiple=_rows(len(jobs), loaded.batch_size),
            log_probs=self.log_probs,
            cache_len=max(_LEAST_CACHE, 1 << (most - 1).bit_length()),
        )
        sent = [""] * len(jobs)
        for made in steps:
            for i, (job, (so_far, is_ended)) in enumerate(zip(jobs, made, strict=True)):
                if job.is_done or job.is_gone:
                    continue
                is_whole = is_ended or len(so_far.ids) == most
                if job.given.is_streamed:
                    text = whole_text(so_far.ids, tokenizer, cfg)
                    settled = text if is_whole else settled_text(so_far.ids, tokenizer, cfg)
                    if not text.startswith(sent[i]):
                        job.finish(Refused(500, "the text changed after a part was sent; ask without 'stream'"))
                        continue
                    if len(settled) > len(sent[i]):
                        job.add(settled[len(sent[i]) :])
                        sent[i] = settled
                if is_whole:
                    job.finish(Text(predict.Generated(whole_text(so_far.ids, tokenizer, cfg), *so_far), is_ended))
            if is_closed() or all(job.is_done or job.is_gone for job in jobs):
                return


def generate_kind(cfg: Config, prompt_len: int, log_probs: bool) -> Generate:
    """How a prompt of so many ids is continued with the options in `cfg.generate`."""
    options = dataclasses.replace(cfg.generate, prompts=())
    return Generate(cfg, options, log_probs, -(-prompt_len // sampling.PROMPT_STEP))


def _key(seed: int) -> jax.Array:
    """That of the first row of the first batch of `LoadedModel.generate`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)


def _rows(count: int, most: int) -> int:
    """Rows of the batch of so many jobs: a power of four, so that few programs are compiled, but at most `most`."""
    rows = 1
    while rows < count:
        rows *= 4
    return min(rows, most)


def whole_text(ids: Sequence[int], tokenizer: Tokenizer, cfg: Config) -> str:
    """The text of new ids, cut before a stop string."""
    return predict.on_one_line(sampling.text_of(ids, tokenizer, cfg), cfg)


def settled_text(ids: Sequence[int], tokenizer: Tokenizer, cfg: Config) -> str:
    """The start of the text of new ids that no further id changes, where none has ended the text.

    Not settled are characters of which some bytes are missing, what tokenizers decode in another way when something
    follows, and what may become a stop string.
    """
    decoded = [tokenizer.decode([*ids, *more]) for more in ([], *_probes(tokenizer))]
    alike = itertools.takewhile(lambda characters: len(set(characters)) == 1, zip(*decoded, strict=False))
    text = "".join(first for first, *_ in alike).rstrip(_REPLACEMENT)
    longest = max(
        (n for stop in cfg.generate.stop for n in range(1, len(stop)) if text.endswith(stop[:n])),
        default=0,
    )
    return predict.on_one_line(text[: len(text) - longest], cfg)


@functools.lru_cache(maxsize=2)
def _probes(tokenizer: Tokenizer) -> list[list[int]]:
    """Ids that may follow: of a letter, and of the first byte of a character that no vocabulary has a piece for. Before
    a byte without the others, some decoders replace whole characters that are made of bytes."""
    spelled = tokenizer.encode("\U0010ffff")
    first = next((i for i in spelled if tokenizer.piece(i).startswith("<0x")), None)
    return [tokenizer.encode("a")[-1:], *([] if first is None else [[first]])]


# Records --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Embed:
    """Embeddings of records."""

    def compute(self, loaded: LoadedModel, jobs: Sequence[Job], is_closed: Callable[[], bool]) -> None:
        for job, found in zip(jobs, predict.embeddings(loaded, _records(jobs)), strict=True):
            if found.counts["sentence_cut"]:
                message = f"a text is longer than the {loaded.config.data.seq_len} ids of a row, marks included"
                job.finish(Refused(400, message, "context_length_exceeded", "input"))
            else:
                job.finish(found)


@dataclasses.dataclass(frozen=True)
class Label:
    """Predictions of records."""

    def compute(self, loaded: LoadedModel, jobs: Sequence[Job], is_closed: Callable[[], bool]) -> None:
        for job, found in zip(jobs, predict.predictions(loaded, _records(jobs)), strict=True):
            job.finish(found)


def _records(jobs: Sequence[Job]) -> Iterator[Record]:
    return (job.given for job in jobs)
